"""Routed experts on one stream while a shared expert is computed on another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from ...backends import Backend
from ...check.sweep import slot
from ...data.generator import hash_elements, mix, stream_key
from ...grouped.backend import AsDense
from ...grouped.tokens import draw_activations
from ...launch.case import Call, Case, Launch, bind, with_room
from ...launch.outcome import (
    Budget,
    NotApplicable,
    Outcome,
    capture,
    device_of,
    outcome,
    repeat,
)
from .lanes import Forks, Together, kinds_of, repeat_threads, run_threads

NAME = "shared-expert"
STAGE = "shared expert"
"""What a finding's `stage` says where what went wrong is the GEMM beside the experts."""
NOT_DENSE = "a dense layer has no shared expert beside it"
_COLUMNS = 512
"""Columns of the shared expert's output, at most."""


def shared_expert(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every launch, while two other streams compute a shared expert of as many tokens, and a fourth
    has the launches of another layer of the backend.

    On a GPU a kernel holds all but a few SMs meanwhile, so that grids of all trickle in among each
    other: half of the budget eagerly, and half as branches of one graph. The shared expert is a
    plain product of 16-bit numbers, exact, and every element of it is compared, too.

    Streams do not wait for each other from launch to launch, so the sets of experts are parted: in
    each of two rounds one stream has some, and the other none of these. That one layer is on two
    streams at once is what `streams` is for, and no engine does it.
    """
    if not isinstance(backend, AsDense):
        raise NotApplicable(NOT_DENSE)
    device = device_of(cases)
    rounds, experts, dense = [], [], []
    for side in _sides(cases):
        mine = [launch for launch in launches if launch.case in side]
        if not mine:
            continue
        calls = [bind(backend, cases, launch) for launch in mine]
        others = [bind(backend, cases, _of_another_layer(cases, x, side)) for x in mine]
        beside = [[_shared(cases, launch, lane) for launch in mine] for lane in range(2)]
        lanes = (calls, beside[0], others, beside[1])
        rounds.append(Together(tuple(tuple(lane) for lane in lanes), one_m=True))
        experts += [*calls, *others]
        dense += [*beside[0], *beside[1]]
    every = [*experts, *dense]
    checker = budget.checker([call.slot for call in every])

    def found(seconds: float, missed: str | None, proof: dict[str, object]) -> Outcome:
        seen = outcome(checker, every, cases, seconds, missed, proof)
        first = len(experts)
        reports = [
            (launch, replace(report, stage=STAGE) if at >= first else report)
            for at, (launch, report) in enumerate(seen.reports)
        ]
        return replace(seen, reports=tuple(reports))

    if device.type == "cpu":

        def at_once() -> frozenset[str]:
            overlapped = run_threads(rounds, lambda lane: nullcontext())
            checker.sweep()
            return overlapped

        return found(*repeat_threads(at_once, kinds_of(rounds), budget, device))

    forks = Forks(rounds, device)
    number = 0

    def once() -> None:
        nonlocal number
        for together in rounds:
            forks.enqueue(number, together)
            number += 1
        checker.sweep()

    def one_by_one() -> None:
        for call in every:
            call.enqueue()

    half = replace(budget, seconds=budget.seconds / 2)
    seconds = repeat(once, half, device)
    captured = capture(once, warm=one_by_one)
    seconds += repeat(captured.replay, half, device)
    return found(seconds, *forks.proof("streams and graph branches"))


def _sides(cases: Sequence[Case]) -> tuple[frozenset[int], frozenset[int]]:
    """The cases in two parts that have no set of experts in common; the second is empty where
    there is one set only."""
    sets: dict[int, int] = {}
    numbers = [sets.setdefault(id(case.operands.weight), len(sets)) for case in cases]
    parts = [{index for index, number in enumerate(numbers) if number % 2 == p} for p in (0, 1)]
    return frozenset(parts[0]), frozenset(parts[1])


def _of_another_layer(cases: Sequence[Case], launch: Launch, side: frozenset[int]) -> Launch:
    """The launch with experts that are not on its `side`, if there are any: those of the next case
    that has room for it; on other rows."""
    able = with_room(cases, launch.m)
    able = [index for index in able if index not in side] or able
    chosen = next((index for index in able if index > launch.case), able[0])
    places = cases[chosen].problem.m - launch.m + 1
    return replace(launch, case=chosen, offset=(launch.offset + places // 2) % places)


def _shared(cases: Sequence[Case], launch: Launch, lane: int) -> Call:
    """A product of as many tokens as the launch has, (m, hidden) by (columns, hidden), exact."""
    case = cases[launch.case]
    device, k = device_of(cases), case.problem.k
    columns = min(_COLUMNS, k)
    key = mix(stream_key(case.operands.seed, f"shared expert {lane}") + launch.offset)
    x = torch.empty(launch.m, k, dtype=case.problem.dtype, device=device)
    draw_activations(x, key)
    signs = (hash_elements(columns, k, mix(key), device) & 2) - 1
    weight = signs.to(x.dtype)
    right = (x.float() @ weight.float().T).to(x.dtype)
    place = slot(right, right)
    by = weight.T

    def enqueue() -> None:
        torch.mm(x, by, out=place.out)

    return Call(launch, x, place, enqueue)
