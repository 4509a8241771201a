"""How far a row is off by how its sums were added up, apart from rounding the output."""

from __future__ import annotations

import torch

COLUMNS = 1024
"""Columns that are judged together, as the witness does."""


def accumulation(out: torch.Tensor, ref: torch.Tensor, columns: int = COLUMNS) -> float:
    """The largest ``norm2(out - round(ref)) / norm2(ref)`` of a row's `columns` columns.

    out (m, n) in its 16-bit dtype, ref (m, n) float32: what adding up in another order or with
    fewer bits, and a rounded factor, make of an output, an element that was rounded to the other
    neighbour for it included. 0 for no rows; rows that are all zero, or not finite, do not count.
    """
    worst = torch.zeros((), dtype=torch.float64, device=out.device)
    for start in range(0, ref.shape[1] if ref.shape[0] else 0, columns):
        part = slice(start, start + columns)
        right = ref[:, part].double()
        off = out[:, part].double() - ref[:, part].to(out.dtype).double()
        size = torch.linalg.vector_norm(right, dim=1)
        ratio = torch.linalg.vector_norm(off, dim=1) / size
        known = (size > 0) & torch.isfinite(ratio)
        # The device is waited for once, at the end: others compute on it, too.
        worst = torch.maximum(worst, torch.where(known, ratio, 0.0).max())
    return float(worst)
