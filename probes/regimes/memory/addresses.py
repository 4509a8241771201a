"""Outputs and activations at every alignment that their type allows, between other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ....machine.memory import is_out_of_memory
from ...backends import Backend
from ...check.sweep import GUARD, POISON, Checker, Slot
from ...launch.case import BackendRaised, Call, Case, Launch, bind, prepared_activation
from ...launch.case import map_tensors as in_all
from ...launch.outcome import (
    Budget,
    Outcome,
    device_of,
    outcome,
    poison,
    repeat,
    wait,
)
from ...problem import Fp4Tensor
from ..host.weights import bound

ALIGNMENTS = (2, 4, 8, 16, 32, 64, 128, 256)
"""Bytes that an address is a multiple of, and of no more."""
_PAGE = 512
"""Bytes that the address of a pool is a multiple of."""
_GUARD = 1024
"""Elements on either side of an output that belong to others."""


def addresses(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every launch at several alignments of its activation and of its output, neither the other's.

    Both lie inside a pool, as slices of rows of a larger tensor do; what is beside them is checked
    or NaN. On a GPU alignments begin at what slices of rows can have there (16 bytes and more for
    widths that are multiples of 8). A backend may refuse an alignment with an exception.
    """
    device = device_of(cases)
    calls: list[Call] = []
    refused: dict[int, str] = {}
    proof: dict[str, Any] = {"activations_at": {}, "outputs_at": {}, "refused": 0}
    for launch in launches:
        problem = cases[launch.case].problem
        ours = allowed(2 * problem.k, device), allowed(2 * problem.n, device)
        for turn in range(max(map(len, ours))):
            # One goes up while the other goes down: they meet in all pairs over the launches.
            left = ours[0][turn % len(ours[0])]
            right = ours[1][(launch.m - turn) % len(ours[1])]
            call, why = _placed(backend, cases, launch, left, right)
            if call is None:
                refused.setdefault(launch.item, why)
                proof["refused"] += 1
                continue
            calls.append(call)
            for name, at in (("activations_at", left), ("outputs_at", right)):
                proof[name][str(at)] = proof[name].get(str(at), 0) + 1
    taken = {call.launch.item for call in calls}
    exempt = {item: f"refused: {why}" for item, why in refused.items() if item not in taken}
    if not calls:
        return Outcome(0, (), 0, 0.0, proof=proof, exempt=exempt)
    checker = Checker([call.slot for call in calls])
    checker.sweep()  # the launches that showed that they are accepted

    def once() -> None:
        for call in calls:
            call.enqueue()
        checker.sweep()

    seconds = repeat(once, budget, device)
    return replace(outcome(checker, calls, cases, seconds, None, proof), exempt=exempt)


def allowed(row_bytes: int, device: torch.device) -> tuple[int, ...]:
    """The alignments to try of a tensor whose rows have so many bytes."""
    least = 2 if device.type == "cpu" else row_bytes & -row_bytes
    return tuple(each for each in ALIGNMENTS if each >= least) or (ALIGNMENTS[-1],)


def _placed(
    backend: Backend, cases: Sequence[Case], launch: Launch, left: int, right: int
) -> tuple[Call | None, str]:
    """The launch with its activation and output so aligned, run once; or None and the refusal."""
    case = cases[launch.case]
    rows = case.rows(launch.offset, launch.m)
    # Codes and scales of one byte are given out at 16 bytes at least, as their layouts say.
    at = max(left, 16) if isinstance(rows, Fp4Tensor) else left
    on = device_of(cases)
    # Rows of what comes beside an activation may be shorter, or longer, than its own.
    seen = in_all(
        rows, lambda t: aligned(t, max(at, allowed(_row_bytes(t), on)[0])) if t.dim() == 2 else t
    )
    window = case.expectation.window(launch.offset, launch.offset + launch.m)
    place = output_at(window.lo, window.hi, right)
    cuda = device_of(cases).type == "cuda"
    try:
        call = bound(backend, case.state, launch, prepared_activation(backend, seen), place)
        call.enqueue()
        wait(place.out.device)
    except (RuntimeError, BackendRaised) as error:
        if is_out_of_memory(error):
            raise
        if cuda:
            torch.cuda.synchronize()  # raises where it was no refusal, but a fault on the device
        # What it refuses at the best alignment, too, is no matter of alignment.
        bind(backend, cases, launch).enqueue()
        lines = str(error).strip().splitlines()
        return None, lines[0][:200] if lines else type(error).__name__
    return call, ""


def _row_bytes(t: torch.Tensor) -> int:
    return t.shape[1] * t.element_size()


def _start(pool: torch.Tensor, least: int, alignment: int) -> int:
    """The first element from `least` on whose address is a multiple of `alignment` and no more."""
    size = pool.element_size()
    address = pool.data_ptr() + least * size
    page = -(-address // _PAGE) * _PAGE
    return least + (page + alignment - address) // size


def aligned(rows: torch.Tensor, alignment: int) -> torch.Tensor:
    """A copy of a matrix, contiguous, at such an address in a pool of poison."""
    spare = 2 * _PAGE
    pool = poison(torch.empty(rows.numel() + 2 * spare, dtype=rows.dtype, device=rows.device))
    first = _start(pool, spare // rows.element_size(), alignment)
    view = pool[first : first + rows.numel()].view(rows.shape)
    view.copy_(rows)
    return view


def output_at(lo: torch.Tensor, hi: torch.Tensor, alignment: int) -> Slot:
    """A poisoned slot for outputs between `lo` and `hi` (m, n) at such an address."""
    size = lo.numel()
    pool = torch.full((size + 2 * _GUARD + _PAGE,), GUARD, dtype=torch.int16, device=lo.device)
    first = _start(pool, _GUARD, alignment)
    inside = pool[first : first + size]
    inside.fill_(POISON)
    around = pool[first - _GUARD : first + size + _GUARD]
    return Slot(inside.view(lo.dtype).view(lo.shape), lo, hi, around)
