"""What a wrong output is made of: the facts that a diagnosis in words is drawn from.

The same launch is made once more, alone, and its output taken apart. Where it is right alone, that
is the fact: the conditions of the regime are part of the fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..backends import Backend
from ..check.reference import alpha_of, expect
from ..check.sweep import POISON
from ..data.operands import Operands, window
from ..problem import FORMATS, Fp4Tensor
from .case import Case, Launch, bind

_ROWS = 64
"""Wrong rows (or columns) that are compared with all others."""
_SAMPLE = 512
"""Columns (or rows) in which they are compared."""
_COMMON = 0.9
_WHOLE = 15 / 16
"""A row is wrong as a whole from this share on: some values are right by chance."""
_STEPS = (256, 128, 64, 32)
"""Tile sizes along k whose remainder a kernel may leave out."""

Facts = dict[str, Any]


def examine(backend: Backend, cases: Sequence[Case], launch: Launch) -> Facts:
    """Make `launch` once, serially, and say what its output is like.

    ``right``: nothing is wrong with it. Else ``bad`` elements, ``bad_rows`` and how many of them
    are bad as a whole (``whole_rows``), the first and last of ``rows`` and ``cols``; and, where
    they are there, the patterns ``zeros`` (share), ``relative`` (median relative error), ``ratio``
    to the right value with ``alpha``, ``rows_from``, ``cols_from`` and ``k_stops_at``. Waits for
    the device.
    """
    call = bind(backend, cases, launch)
    call.enqueue()
    case = cases[launch.case]
    out, lo, hi = call.slot.out, call.slot.lo, call.slot.hi
    bad = ~((out >= lo) & (out <= hi))
    total = int(bad.sum())
    if not total:
        return {"right": True}
    rows, cols = bad.any(dim=1).nonzero().flatten(), bad.any(dim=0).nonzero().flatten()
    facts: Facts = {
        "right": False,
        "bad": total,
        "bad_rows": rows.numel(),
        "whole_rows": int((bad.sum(dim=1) >= _WHOLE * bad.shape[1]).sum()),
        "rows": [int(rows[0]), int(rows[-1])],
        "cols": [int(cols[0]), int(cols[-1])],
    }
    written = bad & (out.view(torch.int16) != POISON)
    if bool(written.any()):
        facts.update(_value_statistics(out, lo, hi, written))
        if "ratio" in facts:
            facts["alpha"] = alpha_of(case.operands)
        for name, found in (
            ("rows_from", _sources(out, lo, hi, rows)),
            ("cols_from", _sources(out.T, lo.T, hi.T, cols)),
        ):
            if found:
                facts[name] = found
        if "rows_from" not in facts and "cols_from" not in facts:
            stop = _stop(case, launch, out, rows)
            if stop:
                facts["k_stops_at"] = stop
    return facts


def _value_statistics(
    out: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, written: torch.Tensor
) -> dict[str, float]:
    """Share of zeros among the wrong values, their median relative error, and the factor that most
    of them are off by."""
    found = out[written].double()
    right = (lo[written].double() + hi[written].double()) / 2
    facts = {"zeros": round(float(((found == 0) & (right != 0)).double().mean()), 4)}
    some = right.isfinite() & (right != 0) & found.isfinite() & (found != 0)
    if int(some.sum()) * 2 > found.numel():
        ratios = found[some] / right[some]
        ratio = ratios.median()
        facts["relative"] = round(float((ratios - 1).abs().median()), 6)
        common = ((ratios / ratio - 1).abs() < 2.0**-6).double().mean()
        if float(common) > _COMMON and abs(float(ratio) - 1) > 2.0**-5:
            facts["ratio"] = float(ratio)
    return facts


def _sources(
    out: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, wrong: torch.Tensor
) -> list[list[int]]:
    """[row, other] for wrong rows that hold just the answer of another row; the first few.

    Empty unless nearly all the wrong rows looked at do, and the answers differ.
    """
    if out.shape[0] < 2 or out.shape[1] < 4:
        return []
    step = max(1, out.shape[1] // _SAMPLE)
    out, lo, hi = out[:, ::step], lo[:, ::step], hi[:, ::step]
    chosen = wrong[:_ROWS]
    pairs: list[list[int]] = []
    for row in chosen.tolist():
        same = ((out[row] >= lo) & (out[row] <= hi)).all(dim=1).nonzero().flatten()
        if same.numel():
            pairs.append([row, int(same[0])])
    return pairs[:4] if len(pairs) >= _COMMON * chosen.numel() else []


def _stop(case: Case, launch: Launch, out: torch.Tensor, rows: torch.Tensor) -> int | None:
    """Where along k the sum ended, if leaving a tail out explains the rows that were wrong."""
    chosen = rows[:_ROWS]
    k = case.problem.k
    block = FORMATS[case.problem.format].block
    cut = window(case.operands, launch.offset, launch.offset + launch.m)
    cut = replace(cut, a=_pick(cut.a, chosen))
    for step in _STEPS:
        stop = k // step * step
        if not 0 < stop < k or stop % block:
            continue
        shorter = _cut_at(cut, stop, block)
        problem = replace(case.problem, m=chosen.numel(), k=stop)
        right = expect(shorter, problem)
        if bool(((out[chosen] >= right.lo) & (out[chosen] <= right.hi)).all()):
            return stop
    return None


def _pick(a: torch.Tensor | Fp4Tensor, rows: torch.Tensor) -> torch.Tensor | Fp4Tensor:
    if isinstance(a, Fp4Tensor):
        return replace(a, codes=a.codes[rows], scales=a.scales[rows])
    return a[rows]


def _cut_at(operands: Operands, k: int, block: int) -> Operands:
    """The operands up to `k`, a multiple of the block."""

    def cut(t: Fp4Tensor) -> Fp4Tensor:
        return replace(
            t,
            codes=t.codes[:, : k // 2].contiguous(),
            scales=t.scales[:, : k // block].contiguous(),
        )

    a = operands.a
    short = cut(a) if isinstance(a, Fp4Tensor) else a[:, :k].contiguous()
    return replace(operands, a=short, weight=cut(operands.weight))
