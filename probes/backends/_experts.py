"""What adapters of routed experts share: ids as engines' dispatchers leave them, and padding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch


def localised(
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    groups: int,
    elsewhere: int,
    scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`ids` with `elsewhere` for every expert outside [0, groups), and the router's `weights`
    times `scaling`: new tensors, one launch on a GPU.

    ids int32 and weights float32 or None, of one shape.
    """
    if not ids.is_cuda:
        here = (ids >= 0) & (ids < groups)
        scaled = None if weights is None else weights * scaling
        return torch.where(here, ids, elsewhere), scaled
    ids = ids.contiguous()
    weights = None if weights is None else weights.contiguous()
    found = torch.empty_like(ids)
    scaled = None if weights is None else torch.empty_like(weights)
    if ids.numel():
        given = ids if weights is None else weights
        into = found if scaled is None else scaled
        block = 256
        _kernel()[(-(-ids.numel() // block),)](
            ids, found, given, into, ids.numel(), groups, elsewhere, scaling, scaled is not None,
            block,
        )  # fmt: skip
    return found, scaled


def up(x: int, multiple: int) -> int:
    """The next multiple."""
    return -(-x // multiple) * multiple


def padded_shards(x: torch.Tensor, shards: int, rows: int, columns: int) -> torch.Tensor:
    """(experts, shards * r, c) with zeros up to (experts, shards * rows, columns)."""
    experts, before, c = x.shape
    parts = x.reshape(experts, shards, before // shards, c)
    spare = (0, columns - c, 0, rows - before // shards)
    return torch.nn.functional.pad(parts, spare).reshape(experts, shards * rows, columns)


def widened(x: torch.Tensor, columns: int) -> torch.Tensor:
    """`x` with zeros up to so many columns, contiguous; itself where it is that."""
    if columns == x.shape[-1]:  # torch would copy
        return x.contiguous()
    return torch.nn.functional.pad(x, (0, columns - x.shape[-1]))


MARLIN_BLOCKS = (8, 16, 32, 48, 64)
"""Slots of a block of Marlin's."""
_SPARSE = 0.9


def marlin_block(tokens: int, top_k: int, groups: int) -> int:
    """The slots of a block that SGLang and vLLM choose for a batch: the fewest that a balanced one
    leaves more than a tenth of free."""
    each = tokens * top_k / groups
    return next((size for size in MARLIN_BLOCKS if each / size < _SPARSE), MARLIN_BLOCKS[-1])


def listed(
    aligned: Sequence[torch.Tensor], block: int, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """An alignment as the stage `permute` gives it: each row's slot, `slots` where there is none,
    and whose it is. Enqueues only.

    aligned  int32: sorted slots, the expert of each block, and how many rows are used
    """
    rows, experts, count = aligned
    used = torch.arange(len(rows), device=rows.device) < count[0]
    return torch.where(used, rows, slots), experts.repeat_interleave(block)[: len(rows)]


@functools.cache
def _kernel() -> Any:
    from ._experts_triton import localise

    return localise
