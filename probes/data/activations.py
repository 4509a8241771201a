"""16-bit activations to quantise: float32 (m, k) by kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .blocks import normal_matrix
from .generator import hash_elements, hash_rows


def _normal(m: int, k: int, key: int, device: Any) -> torch.Tensor:
    return normal_matrix(m, k, key, device)


def _outlier_channels(m: int, k: int, key: int, device: Any) -> torch.Tensor:
    channel = hash_rows(k, key + 1, device)
    return _normal(m, k, key, device) * torch.where((channel & 63) == 0, 47.0, 1.0)


def _with_zero_blocks(m: int, k: int, key: int, device: Any) -> torch.Tensor:
    """Blocks of zeros, with -0 among them, between ordinary ones."""
    keep = (hash_elements(m, k // 16, key + 2, device) & 3) != 0
    return _normal(m, k, key, device) * keep.repeat_interleave(16, dim=1)


def _ties(m: int, k: int, key: int, device: Any) -> torch.Tensor:
    """Exactly between two codes, in blocks whose largest is 6 times a power of two."""
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], device=device)
    bits = hash_elements(m, k, key + 3, device)
    x = middle[(bits & 7).long()] * torch.where((bits & 8) != 0, -1.0, 1.0)
    x[:, ::16] = 6.0
    return x * torch.exp2((hash_rows(m, key + 4, device) & 3).float()).unsqueeze(1)


def _wide(m: int, k: int, key: int, device: Any) -> torch.Tensor:
    """Blocks from 1 down to 2^-15: NVFP4's block scales become subnormal, and then zero."""
    power = (hash_elements(m, k // 16, key + 5, device) & 15).float()
    return _normal(m, k, key, device) * torch.exp2(-power).repeat_interleave(16, dim=1)


ACTIVATIONS: Mapping[str, Callable[[int, int, int, Any], torch.Tensor]] = {
    "realistic": _normal,
    "outliers": _outlier_channels,
    "zero-blocks": _with_zero_blocks,
    "ties": _ties,
    "wide-scales": _wide,
}
"""Float32 (m, k) by family; drawn for (m, k, key, device)."""
