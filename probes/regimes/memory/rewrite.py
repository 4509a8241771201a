"""New data at the old address: eagerly, and between replays of one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...backends import Backend
from ...check.sweep import Slot
from ...grouped.tensors import Routed
from ...launch.case import (
    Call,
    Case,
    Launch,
    bind,
    copy_over,
    map_tensors,
    prepared_activation,
    rebind,
    tensors,
)
from ...launch.outcome import Budget, Outcome, capture, device_of, outcome, poison, repeat, together
from ...problem import Fp4Tensor

_FP4_SIGNS = 0x88
"""The sign bits of both e2m1 codes of a byte."""


@dataclass(frozen=True, slots=True)
class _Changing:
    """One launch, reading `live`, and what to put there in turn, with what must come out then."""

    live: list[torch.Tensor]
    data: tuple[list[torch.Tensor], list[torch.Tensor]]
    calls: tuple[Call, Call]
    """The same call twice: into one output, with the expectation of either data."""


def rewrite(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every launch by turns on one data and another of the same width at the same addresses.

    An output cached by pointer, or a stale copy of the activation (a quantised one), answers with
    the data before. Half of the budget is eager; on a GPU the other half replays one graph.
    """
    changing = [_changing(backend, cases, launch) for launch in launches]
    calls = tuple([c.calls[turn] for c in changing] for turn in (0, 1))
    checkers = tuple(budget.checker([call.slot for call in side]) for side in calls)
    device = device_of(cases)

    def chain() -> None:
        for each in changing:
            each.calls[0].enqueue()

    def both(launch_all: Callable[[], Any]) -> None:
        for turn in (0, 1):
            for each in changing:
                for to, origin in zip(each.live, each.data[turn], strict=True):
                    to.copy_(origin)
            launch_all()
            checkers[turn].sweep()

    half = replace(budget, seconds=budget.seconds / 2) if device.type == "cuda" else budget
    seconds = repeat(lambda: both(chain), half, device)
    rounds = {"eager": checkers[0].sweeps}
    if device.type == "cuda":
        captured = capture(chain)
        # What capturing left in the outputs was not asked for; one round checks and poisons them.
        for side in calls:
            for call in side:
                poison(call.slot.out)
        seconds += repeat(lambda: both(captured.replay), half, device)
        rounds["replayed"] = checkers[0].sweeps - rounds["eager"]
    differ = sum(
        any(not torch.equal(x, y) for x, y in zip(*each.data, strict=True)) for each in changing
    )
    missed = None
    if any(launch.m for launch in launches) and not differ:
        missed = "there was no other data to put in place"
    parts = [outcome(checkers[turn], calls[turn], cases, seconds / 2) for turn in (0, 1)]
    return replace(
        together(parts), not_exercised=missed, proof={"rounds": rounds, "changed": differ}
    )


def _changing(backend: Backend, cases: Sequence[Case], launch: Launch) -> _Changing:
    first = bind(backend, cases, launch)
    case = cases[launch.case]
    room = case.problem.m - launch.m
    other = replace(launch, offset=(launch.offset + max(1, room // 2)) % (room + 1))
    rows, expected = case.rows(other.offset, launch.m), case.expectation
    window = expected.window(other.offset, other.offset + launch.m)
    lo, hi = window.lo, window.hi
    if other.offset == launch.offset and not isinstance(rows, Routed):
        # No other rows: the same with the other sign, whose answer has the other sign.
        same = rows
        turned = rows, lo, hi = _negated(same), -window.hi, -window.lo
        case.derive(lambda: copy_over((_negated(same), -window.hi, -window.lo), turned))
    prepared = prepared_activation(backend, rows)
    if prepared is not rows:
        case.derive(lambda: copy_over(prepared_activation(backend, rows), prepared))
    # Listed before the first launch: a backend may keep more in its own activation later.
    data = (tensors(first.activation), tensors(prepared))
    live = map_tensors(first.activation, torch.clone)
    call = rebind(backend, cases, first, live)
    slot = Slot(first.slot.out, lo, hi, first.slot.guarded)
    return _Changing(tensors(live), data, (call, replace(call, launch=other, slot=slot)))


def _negated(rows: Any) -> Any:
    if isinstance(rows, Fp4Tensor):
        return replace(rows, codes=rows.codes ^ _FP4_SIGNS)
    return -rows
