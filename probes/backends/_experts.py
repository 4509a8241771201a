"""What adapters of routed experts share: ids as engines' dispatchers leave them, and padding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..grouped.problem import ExpertsProblem


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


class PaddedExperts(Protocol):
    """Experts as they were prepared: the intermediate size `n` and the hidden size `k` are padded,
    and w13 has `w13.n` rows."""

    @property
    def problem(self) -> ExpertsProblem: ...
    @property
    def w13(self) -> Any: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...


@dataclass(frozen=True, slots=True)
class LayerSteps:
    """The launches of one call, each from its first tensors into its last.

    gemm      which (1 or 2); tokens (tokens, k), or slots (slots, n); (slots, w13.n or k)
    activate  (slots, w13.n); (slots, n)
    add       (tokens, top_k, k), multiplied by the router's weights; (tokens, k)
    """

    gemm: Callable[[int, torch.Tensor, torch.Tensor], None]
    activate: Callable[[torch.Tensor, torch.Tensor], None]
    add: Callable[[torch.Tensor, torch.Tensor], None]


def run_steps(layer: PaddedExperts, x: torch.Tensor, out: torch.Tensor, steps: LayerSteps) -> None:
    """A whole layer into `out`, as both engines call Marlin's experts: gemm2 writes where gemm1
    did, since that is dead by then."""
    tokens, top_k = x.shape[0], layer.problem.top_k
    slots, n13, hidden = tokens * top_k, layer.w13.n, layer.problem.k
    both = x.new_empty(slots * max(n13, layer.k))
    h13 = both[: slots * n13].view(slots, n13)
    steps.gemm(1, widened(x, layer.k), h13)
    h = x.new_empty(slots, layer.n)
    steps.activate(h13, h)
    y = both[: slots * layer.k].view(slots, layer.k)
    steps.gemm(2, h, y)
    total = out if layer.k == hidden else x.new_empty(tokens, layer.k)
    steps.add(y.view(tokens, top_k, layer.k), total)
    if total is not out:
        out.copy_(total[:, :hidden])


def without_padding(layer: PaddedExperts, h13: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, top_k, rows of w13) of gemm1's result (slots, w13.n)."""
    parts = h13.view(*ids.shape, h13.shape[1] // layer.n, layer.n)[..., : layer.problem.n]
    return parts.reshape(*ids.shape, layer.problem.rows13)


def with_padding(layer: PaddedExperts, h13: torch.Tensor) -> torch.Tensor:
    """(slots, w13.n) of (tokens, top_k, rows of w13); may be `h13` itself."""
    parts = h13.reshape(-1, layer.w13.n // layer.n, layer.problem.n)
    return widened(parts, layer.n).view(-1, layer.w13.n)


def refill(old: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> None:
    """What was prepared anew, in the memory of what was prepared before."""
    for into, given in zip(old, new, strict=True):
        into.copy_(given)


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
