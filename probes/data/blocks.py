"""Matrices that families are made of: normal floats, and FP4 tensors with chosen block scales."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..problem import Format, Fp4Tensor
from .generator import Drawn, below, fill_rows, hash_elements, hash_rows, mix, normal

GROUP = 128
"""Rows that share a hash in `random_fp4`: those of one tile of the output."""

Device = torch.device | str


def normal_matrix(rows: int, k: int, key: int, device: Device) -> torch.Tensor:
    """float32 (rows, k), normal as in `data_random.normal`."""
    out = torch.empty(rows, k, dtype=torch.float32, device=device)
    return fill_rows(out, lambda first, count: normal(count, k, key, device, first), k)


def random_fp4(
    drawn: Drawn,
    fmt: Format,
    scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    global_scale: float = 1.0,
) -> Fp4Tensor:
    """Uniform codes, and raw scales from `scale(block hashes (r, k/block), hashes of their
    groups of 128 rows (r, 1))`."""

    rows, k, key, device = drawn.rows, drawn.k, drawn.key, drawn.device

    def codes(first: int, count: int) -> torch.Tensor:
        return (hash_elements(count, k // 2, key, device, first) & 255).to(torch.uint8)

    def scales(first: int, count: int) -> torch.Tensor:
        bits = hash_elements(count, k // fmt.block, mix(key + 1), device, first)
        group = torch.arange(first, first + count, device=device) // GROUP
        by_group = hash_rows(-(-rows // GROUP), mix(key + 2), device)[group].unsqueeze(1)
        return scale(bits, by_group).to(torch.uint8)

    packed = torch.empty(rows, k // 2, dtype=torch.uint8, device=device)
    raw = torch.empty(rows, k // fmt.block, dtype=torch.uint8, device=device)
    fill_rows(packed, codes, k // 2)
    fill_rows(raw, scales, k // fmt.block)
    multiplier = torch.tensor(global_scale, dtype=torch.float32, device=device)
    return Fp4Tensor(fmt, packed, raw, multiplier)


def uniform_bytes(low: int, high: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Raw scales uniform in [low, high]."""
    return lambda bits, by_group: low + below(bits, 0, 16, high - low + 1)
