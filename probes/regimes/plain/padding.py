"""NaN where nothing of the problem is: rows past m, rows an engine pads with, padding of scales."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from ... import layouts
from ...backends import Backend
from ...check.sweep import Slot, uploaded
from ...grouped.backend import AsDense
from ...grouped.tensors import Routed
from ...grouped.tokens import Rests
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
from ...launch.outcome import Budget, Outcome, device_of, outcome, poison, repeat
from ...problem import Format, Fp4Tensor

LEAD, TRAIL = 16, 128
"""Rows of NaN before and after an activation: the 128 of a scale layout's tile."""
SCALE_NAN = {"e4m3": 0x7F, "e8m0": 0xFF}


def padding(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every launch with poison around it, and once more with poison in its last rows.

    *Around*: the activation lies between rows of NaN, and what pads scale layouts is NaN (0x7F in
    e4m3, 0xFF in e8m0) instead of zero. *In*: as in a CUDA graph captured for more rows than there
    are, the second half of the m rows is NaN, and only the first half of the output is asked for;
    there, a sum or a largest value over all rows shows; of routed experts the router's weights are
    NaN there, too. *Scattered*: rows at random places are NaN, and then zero, the last row or an
    only one among them; what comes of the others is asked for, and of rows of zeros that they give
    zeros, or what biases make of them.
    """
    calls: list[Call] = []
    nan_rows = scattered = 0
    scale_bytes: list[torch.Tensor] = []
    rests = Rests(backend.problem) if isinstance(backend, AsDense) and backend.problem else None
    every = [_some_rows(launch) if launch.m else [] for launch in launches]
    device = device_of(cases)
    places = iter(_indices([rows for some in every for rows in some], device))
    for launch, some in zip(launches, every, strict=True):
        around, differ = _around(backend, cases, launch)
        calls.append(around)
        scale_bytes += differ
        if launch.m > 1:
            calls.append(_nan_inside(backend, cases, launch))
            nan_rows += launch.m // 2
        for at in islice(places, len(some)):
            for zeros in (False, True):
                scattered += len(at)
                calls.append(_with_rows(backend, cases, launch, at, zeros, rests))
    checker = budget.checker([call.slot for call in calls])

    def once() -> None:
        for call in calls:
            call.enqueue()
        checker.sweep()

    seconds = repeat(once, budget, device)
    padded = [each.to(device) for each in scale_bytes]
    proof = {
        "rows_around": (LEAD + TRAIL) * len(launches),
        "rows_inside": nan_rows,
        "rows_scattered": scattered,
        "scale_padding_bytes": int(torch.stack(padded).sum()) if padded else 0,
    }
    return outcome(checker, calls, cases, seconds, None, proof)


def _around(
    backend: Backend, cases: Sequence[Case], launch: Launch
) -> tuple[Call, list[torch.Tensor]]:
    """The launch amid poison, and how many bytes of padding in the backend's layout are poison:
    int64 () of each part of it, which nothing waits for yet."""
    case = cases[launch.case]
    rows = case.rows(launch.offset, launch.m)
    plain = prepared_activation(backend, rows)
    fill = SCALE_NAN[case.operands.weight.format.scale]
    activation = _changed(backend, case, launch, lambda rows: None, fill)
    differ = [
        (one != other).sum()
        for one, other in zip(tensors(plain), tensors(activation), strict=True)
        if one.dtype == torch.uint8 and one.shape == other.shape
    ]
    return rebind(backend, cases, bind(backend, cases, launch), activation), differ


def _changed(
    backend: Backend,
    case: Case,
    launch: Launch,
    change: Callable[[Any], None],
    fill: int | None = None,
) -> Any:
    """The activation of a launch amid poison and after `change` of its rows, as the backend wants
    it; both are done again, in place, where the rows are drawn anew. With `fill`, so is what pads
    scales in the backend's layout."""
    rows = _surrounded(case.rows(launch.offset, launch.m))

    def prepared() -> Any:
        change(rows)
        with layouts.padding(fill) if fill is not None else nullcontext():
            return prepared_activation(backend, rows)

    activation = prepared()

    def renew() -> None:
        copy_over(case.rows(launch.offset, launch.m), rows)
        again = prepared()
        if activation is not rows:
            copy_over(again, activation)

    case.derive(renew)
    return activation


def _nan_inside(backend: Backend, cases: Sequence[Case], launch: Launch) -> Call:
    """The launch with NaN in its second half, and only the first half of its output checked."""
    real = launch.m - launch.m // 2
    case = cases[launch.case]

    def half_nan(rows: Any) -> None:
        if isinstance(rows, Fp4Tensor):
            rows.scales[real:].fill_(SCALE_NAN[rows.format.scale])
        else:
            for each in (rows.x, rows.weights) if isinstance(rows, Routed) else (rows,):
                poison(each[real:])

    bound = bind(backend, cases, launch)
    activation = _changed(backend, case, launch, half_nan)
    call = rebind(backend, cases, bound, activation)
    whole = bound.slot
    size = real * whole.out.shape[1]
    guard = (whole.guarded.numel() - whole.out.numel()) // 2
    # Rows after the real ones hold what it may: no zone to guard on that side, so on neither.
    inner = whole.guarded[guard : guard + size]
    return replace(call, slot=Slot(whole.out[:real], whole.lo[:real], whole.hi[:real], inner))


def _some_rows(launch: Launch) -> list[list[int]]:
    """A third of the rows twice, at random: once without the last, and once with it and without
    the first. An only row is taken alone."""
    m = launch.m
    if m == 1:
        return [[0]]
    rng = random.Random(f"{launch.case}/{launch.offset}/{m}/{launch.tactic}")
    count = max(1, m // 3)
    early, late = rng.sample(range(m - 1), count), rng.sample(range(1, m), count)
    return [sorted(early), sorted({*late, m - 1})]


def _indices(rows: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """int64 of each of these on the device, by one copy."""
    flat = torch.tensor([row for each in rows for row in each], dtype=torch.int64)
    return list(uploaded(flat, device).split([len(each) for each in rows]))


def _with_rows(
    backend: Backend,
    cases: Sequence[Case],
    launch: Launch,
    at: torch.Tensor,
    zeros: bool,
    rests: Rests | None,
) -> Call:
    """The launch with the rows `at` all zero, which must give zeros, or all NaN, which may not
    spread: what they give themselves is not asked for."""
    case = cases[launch.case]
    bound = bind(backend, cases, launch)
    whole = bound.slot

    # Where one answer is right both ends are the same tensor.
    lo = torch.empty_like(whole.lo)
    hi = lo if whole.hi.data_ptr() == whole.lo.data_ptr() else torch.empty_like(whole.hi)

    # Filled by kernels that are told the value: ``rows[at] = value`` waits for a copy of it.
    def change(rows: Any) -> None:
        if isinstance(rows, Fp4Tensor):
            rows.scales.index_fill_(0, at, 0 if zeros else SCALE_NAN[rows.format.scale])
            if zeros:
                # In e8m0 no scale is zero: the codes are.
                rows.codes.index_fill_(0, at, 0)
        else:
            x = rows.x if isinstance(rows, Routed) else rows
            x.index_fill_(0, at, 0.0 if zeros else float("nan"))
        for mine, right in ((lo, whole.lo), (hi, whole.hi)):
            mine.copy_(right)
            mine.index_fill_(0, at, 0.0)
        if zeros and rests and isinstance(rows, Routed):
            # Rows of zeros still have the experts' biases.
            biases = rests(case, rows).index_select(0, at)
            for mine in (lo, hi):
                mine.index_copy_(0, at, biases)

    activation = _changed(backend, case, launch, change)
    call = rebind(backend, cases, bound, activation)
    place = Slot(whole.out, lo, hi, whole.guarded)
    if zeros:
        return replace(call, slot=place)

    def enqueue() -> None:
        call.enqueue()
        whole.out.index_fill_(0, at, 0.0)

    return replace(call, slot=place, enqueue=enqueue)


def _surrounded(rows: Any) -> Any:
    """A copy of an activation in the middle of poison; a view of whole rows."""
    if isinstance(rows, Routed):
        return map_tensors(rows, lambda each: _amid(each, None))
    if isinstance(rows, Fp4Tensor):
        codes = _amid(rows.codes, None)
        return replace(rows, codes=codes, scales=_amid(rows.scales, rows.format))
    return _amid(rows, None)


def _amid(rows: torch.Tensor, scales: Format | None) -> torch.Tensor:
    m, columns = rows.shape
    whole = torch.empty((LEAD + m + TRAIL, columns), dtype=rows.dtype, device=rows.device)
    if scales:
        whole.fill_(SCALE_NAN[scales.scale])
    else:
        poison(whole)
    inner = whole[LEAD : LEAD + m]
    inner.copy_(rows)
    return inner
