"""Activations that are views: rows further apart than k, and a base that is 16 bytes off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....machine.memory import is_out_of_memory
from ...backends import Backend
from ...launch.case import (
    BackendRaised,
    Call,
    Case,
    Launch,
    bind,
    copy_over,
    prepared_activation,
    rebind,
)
from ...launch.case import map_tensors as in_all
from ...launch.outcome import Budget, Outcome, device_of, outcome, poison, repeat
from ...problem import Fp4Tensor

OFFSET = 16
"""Bytes: what vector loads and the TMA need at least."""
GAP = 128
"""Bytes between the end of a row and the next."""


def strided(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every launch on an activation with gaps between its rows, and on one 16 bytes off.

    Gaps hold NaN. A backend may refuse such an activation with an exception: then there is nothing
    to check, and an item whose every view is refused is `not applicable`. To take it and answer
    wrong is a failure.
    """
    calls: list[Call] = []
    refused: dict[int, str] = {}
    proof: dict[str, Any] = {"accepted": {}, "refused": {}}
    for launch in launches:
        for name, view in VIEWS.items():
            call, why = _accepted(backend, cases, launch, view)
            if call:
                calls.append(call)
            else:
                refused.setdefault(launch.item, f"{name}: {why}")
            count = proof["accepted" if call else "refused"]
            count[name] = count.get(name, 0) + 1
    taken = {call.launch.item for call in calls}
    exempt = {item: f"refused, {why}" for item, why in refused.items() if item not in taken}
    if refused:
        proof["reason"] = next(iter(refused.values()))
    if not calls:
        return Outcome(0, (), 0, 0.0, proof=proof, exempt=exempt)
    checker = budget.checker([call.slot for call in calls])
    checker.sweep()  # the launches that showed that they are accepted

    def once() -> None:
        for call in calls:
            call.enqueue()
        checker.sweep()

    seconds = repeat(once, budget, device_of(cases))
    found = outcome(checker, calls, cases, seconds, None, proof)
    return Outcome(
        found.repeats, found.reports, found.changed_inputs, seconds, proof=proof, exempt=exempt
    )


def _gaps(rows: torch.Tensor) -> torch.Tensor:
    m, columns = rows.shape
    gap = GAP // rows.element_size()
    whole = poison(torch.empty((m + 1, columns + gap), dtype=rows.dtype, device=rows.device))
    view = whole[:m, :columns]
    view.copy_(rows)
    return view


def _offset(rows: torch.Tensor) -> torch.Tensor:
    m, columns = rows.shape
    off = OFFSET // rows.element_size()
    flat = poison(torch.empty(off + m * columns + off, dtype=rows.dtype, device=rows.device))
    view = flat[off : off + m * columns].view(m, columns)
    view.copy_(rows)
    return view


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "row stride": _gaps,
    "16 bytes off": _offset,
}


def _accepted(
    backend: Backend,
    cases: Sequence[Case],
    launch: Launch,
    view: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[Call | None, str]:
    """The launch on such a view, run once; or None and what the backend raised."""
    rows = cases[launch.case].rows(launch.offset, launch.m)
    bound = bind(backend, cases, launch)
    seen: torch.Tensor | Fp4Tensor = in_all(rows, lambda t: view(t) if t.dim() == 2 else t)
    cuda = device_of(cases).type == "cuda"
    try:
        activation = prepared_activation(backend, seen)
        call = rebind(backend, cases, bound, activation)
        call.enqueue()
        if cuda:
            torch.cuda.synchronize()
    except (RuntimeError, BackendRaised) as error:
        if is_out_of_memory(error):
            raise
        if cuda:
            torch.cuda.synchronize()  # raises where it was no refusal, but a fault on the device
        lines = str(error).strip().splitlines()
        return None, lines[0][:200] if lines else type(error).__name__
    drawn = cases[launch.case]
    drawn.derive(lambda: copy_over(rows, seen))
    if activation is not seen:
        drawn.derive(lambda: copy_over(prepared_activation(backend, seen), activation))
    return call, ""
