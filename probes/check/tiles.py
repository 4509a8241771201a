"""How far an output is off, tile by tile: the judgement where partial sums are short."""

from __future__ import annotations

from math import sqrt

import torch
from torch.nn.functional import pad

from .rounding import SMALLEST_SUBNORMAL

TILE = 128
TILE_LIMIT = 1.5e-2
"""Largest relative Frobenius error of a right 128x128 tile, up to k = 5057."""
_PER_ROOT = 1.35e-2 / 64
"""Past that, times sqrt(k)."""


def tile_limit(k: int) -> float:
    """The largest relative Frobenius error of a right tile: 1.5e-2, growing with sqrt(k).

    Rounding to bf16 has a relative error of 1.7e-3 (root mean square), so adding up P partial sums
    in bf16 makes 1.7e-3 * sqrt(P/2): with one sum per 64 along k, 9.6e-3 at k = 4096 and 1.9e-2 at
    k = 16384, and in the worst of 10^5 tiles of one row 1.4 times that (measured on every family).
    A dropped 16-block makes 4/sqrt(k), 6e-2 and 3e-2 there; past k = 19,000 it is below the limit,
    and exact problems, which tolerate nothing, are what catches it.
    """
    return max(TILE_LIMIT, _PER_ROOT * sqrt(k))


def tile_error(
    out: torch.Tensor, ref: torch.Tensor, spread: torch.Tensor | None = None, tile: int = TILE
) -> torch.Tensor:
    """Relative Frobenius error of each tile: ``|out - ref| / |ref|``, float64 (tiles_m, tiles_n).

    With `spread` (m, n), the root of each element's sum of squared products, over the larger of
    ``|ref|`` and ``|spread|``: where few elements make up a tile, what rounding leaves is no larger
    for their sums to have cancelled out.

    out (m, n) in its 16-bit dtype, ref (m, n) float32 or float64; edge tiles are smaller. An
    element may be off by half the output's smallest subnormal at no cost. Where the reference of a
    tile is all zero, the error is 0 if the output is, too, and infinite otherwise. A NaN, or an
    infinity that the reference does not have, makes it infinite.
    """
    m, n = out.shape
    tiles_m, tiles_n = -(-m // tile), -(-n // tile)
    result = torch.empty(tiles_m, tiles_n, dtype=torch.float64, device=out.device)
    free = SMALLEST_SUBNORMAL.get(out.dtype, 0.0) / 2
    for row in range(tiles_m):
        part = slice(row * tile, min(m, (row + 1) * tile))
        right = ref[part].double()
        off = (out[part].double() - right).abs_()
        off = torch.where(out[part] == ref[part], torch.zeros_like(off), off)
        excess = _norm((off - free).clamp_(min=0), tile)
        size = _norm(right, tile)
        if spread is not None:
            size = torch.maximum(size, _norm(spread[part].double(), tile))
        error = torch.where(excess > 0, excess / size, torch.zeros_like(size))
        result[row] = torch.where(torch.isnan(excess) | torch.isnan(error), float("inf"), error)
    return result


def _norm(rows: torch.Tensor, tile: int) -> torch.Tensor:
    """The Frobenius norm of each tile of one band of rows, safe from overflow of the squares."""
    columns = -(-rows.shape[1] // tile) * tile
    bands = pad(rows, (0, columns - rows.shape[1])).reshape(rows.shape[0], -1, tile)
    return torch.linalg.vector_norm(bands, dim=(0, 2))
