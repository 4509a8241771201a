"""Each stage of routed experts behind a kernel that stores its inputs late: the race between two
kernels of one call, made to happen wherever the backend can be cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...backends import Backend
from ...check.sweep import Slot, slot
from ...grouped.backend import AsDense, stages_of
from ...grouped.exact import Stages, stages
from ...grouped.problem import ExpertsProblem
from ...grouped.tensors import Routed
from ...launch.case import Case, Launch, blame
from .chain import Step, arriving, duration_ns

MOST_CUT = 6
"""Launches whose stages are attacked, at most."""
_MOST_ROWS = 128
"""The largest m of these."""


@dataclass(frozen=True, slots=True)
class CutStage:
    """One stage of one launch: its name, what it is given, and what it must give, by row."""

    name: str
    launch: Launch
    given: tuple[torch.Tensor, ...]
    place: Slot
    """(rows, columns): where what it gave is put to be checked."""
    call: Callable[..., torch.Tensor]
    """What runs the stage on what it is given; of the shape of `place`."""

    def step(self, derive: Callable[[Callable[[], object]], None]) -> Step:
        """The stage as a step of a chain, with inputs that arrive late."""
        run = partial(self._into, self.given)
        duration = duration_ns(run)
        late, moves = arriving(self.given, derive=derive)
        return Step(partial(self._into, late), (self.place,), moves, duration)

    def _into(self, given: tuple[torch.Tensor, ...]) -> None:
        self.place.out.copy_(self.call(*given))


def cut_stages(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch]
) -> list[CutStage]:
    """Every stage that a backend of routed experts can be cut into, of each item's first launch of
    not too many rows; of a dense one none."""
    if not isinstance(backend, AsDense) or backend.problem is None:
        return []
    firsts = {x.item: x for x in reversed(launches) if 0 < x.m <= _MOST_ROWS}
    found = []
    for launch in list(firsts.values())[:MOST_CUT]:
        found += _cut_launch(backend, backend.problem, cases[launch.case], launch)
    return found


def _cut_launch(
    backend: AsDense, problem: ExpertsProblem, case: Case, launch: Launch
) -> list[CutStage]:
    """Every stage of one launch; what all are given and must give is computed together."""
    weights: Any = case.operands.weight
    routed: Any = case.rows(launch.offset, launch.m)
    window = slice(launch.offset, launch.offset + launch.m)

    def by_stage() -> dict[str, Inputs]:
        right = stages(problem, weights, routed)
        lo = case.expectation.lo[window]
        return {name: _inputs(name, routed, right, lo) for name in stages_of(backend)}

    # What a stage gives is what the next is given, and may change in place.
    inputs = {name: (given, wanted.clone()) for name, (given, wanted) in by_stage().items()}

    def renewed() -> None:
        for mine, again in zip(inputs.values(), by_stage().values(), strict=True):
            for to, origin in zip(_flat(mine), _flat(again), strict=True):
                to.copy_(origin)

    case.derive(renewed)
    return [
        _cut_stage((backend, problem, case), launch, routed, name, mine)
        for name, mine in inputs.items()
    ]


def _cut_stage(
    of: tuple[AsDense, ExpertsProblem, Case],
    launch: Launch,
    routed: Any,
    name: str,
    inputs: Inputs,
) -> CutStage:
    backend, problem, case = of
    given, wanted = inputs
    own: Any = backend.own
    run = getattr(own, name)

    def call(*late: torch.Tensor) -> torch.Tensor:
        with blame(backend):
            made = run(case.state, *late, launch.tactic)
        if name == "permute":
            rows, experts = made
            # By where tokens go, and not by what came of that.
            return placed(rows, experts, routed.ids, problem.groups)
        found: torch.Tensor = made
        return found.reshape(wanted.shape)

    return CutStage(name, launch, given, slot(wanted, wanted), call)


Inputs = tuple[tuple[torch.Tensor, ...], torch.Tensor]


def _flat(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (*inputs[0], inputs[1])


def _inputs(name: str, routed: Routed, right: Stages, out: torch.Tensor) -> Inputs:
    """What a stage is given, as `grouped.backend.STAGES` has it without the state and the tactic,
    and what it must give, of two dimensions."""
    if name == "permute":
        return (routed.ids,), torch.ones_like(routed.weights, dtype=out.dtype)
    if name == "gemm1":
        return (routed.x, routed.ids), right.h13.flatten(0, 1)
    if name == "activate":
        return (right.h13,), right.h.flatten(0, 1)
    if name == "gemm2":
        return (right.h, routed.ids), right.y.flatten(0, 1)
    return (right.y, routed.ids, routed.weights), out


def placed(
    rows: torch.Tensor, experts: torch.Tensor, ids: torch.Tensor, groups: int
) -> torch.Tensor:
    """bf16 (tokens, top_k): 1 where a slot is once in a sorted order, as its own expert's, or is of
    an expert that is elsewhere; enqueues only."""
    slots = ids.numel()
    named = rows.flatten().long()
    at = torch.where((named >= 0) & (named < slots), named, slots)
    wanted = torch.cat((ids.flatten(), ids.new_full((1,), -1)))
    mine = (experts.flatten().long() == wanted[at]).long()
    times = torch.zeros(2, slots + 1, dtype=torch.int64, device=ids.device)
    times[0].index_add_(0, at, torch.ones_like(at))
    times[1].index_add_(0, at, mine)
    once = ((times == 1).all(dim=0))[:-1]
    elsewhere = (wanted[:-1] < 0) | (wanted[:-1] >= groups)
    return (once | elsewhere).view(ids.shape).to(torch.bfloat16)
