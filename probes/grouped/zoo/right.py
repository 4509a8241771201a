"""Right ones that do things in another way: none may be flagged."""

from __future__ import annotations

from itertools import count

import torch

from ..floor import Blocks, Prepared, TorchExperts


class Atomics(TorchExperts):
    """Adds up in bf16, in an order that is another in every call."""

    name = "zoo-experts-right-atomics"

    def __init__(self) -> None:
        self.calls = count()

    def finalize(
        self,
        state: Prepared,
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        here = ((ids >= 0) & (ids < state.problem.groups)).unsqueeze(2)
        each = torch.where(here, y.float() * weights.unsqueeze(2), 0.0)
        each = (each * state.problem.scaling).to(y.dtype)
        total = torch.zeros_like(each[:, 0])
        first = next(self.calls)
        for place in range(ids.shape[1]):
            total = total + each[:, (first + place) % ids.shape[1]]
        return total


class PaddingKept(TorchExperts):
    """Every expert's slots are padded to a whole block more than is needed."""

    name = "zoo-experts-right-padding"

    def blocks(self, state: Prepared, ids: torch.Tensor) -> Blocks:
        found = super().blocks(state, ids)
        none = torch.full_like(found.slots, ids.numel())
        return Blocks(torch.cat((found.slots, none)), torch.cat((found.experts, found.experts)))


class Unsorted(TorchExperts):
    """One block a slot, in the order of the tokens."""

    name = "zoo-experts-right-unsorted"

    def blocks(self, state: Prepared, ids: torch.Tensor) -> Blocks:
        groups = state.problem.groups
        flat = ids.flatten().long()
        here = (flat >= 0) & (flat < groups)
        index = torch.arange(flat.numel(), device=ids.device)
        slots = torch.where(here, index, flat.numel()).unsqueeze(1)
        return Blocks(slots, flat.clamp(0, groups - 1))


class Backwards(TorchExperts):
    """The last expert first, and each block from its end."""

    name = "zoo-experts-right-backwards"

    def blocks(self, state: Prepared, ids: torch.Tensor) -> Blocks:
        found = super().blocks(state, ids)
        return Blocks(found.slots.flip(0, 1), found.experts.flip(0))


class Fused(TorchExperts):
    """Keeps float32 between gemm1 and the activation, and has no stage that could be seen."""

    name = "zoo-experts-right-fused"
    permute = gemm1 = activate = gemm2 = finalize = None  # type: ignore[assignment]

    def run(
        self,
        state: Prepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        if not x.shape[0]:
            return
        whole = TorchExperts()
        wide = whole.gemm1(state, x.float(), ids, tactic)
        h = whole.activate(state, wide, tactic).to(x.dtype)
        y = whole.gemm2(state, h.float(), ids, tactic)
        out.copy_(whole.finalize(state, y, ids, weights, tactic))


RIGHT = (Atomics, PaddingKept, Unsorted, Backwards, Fused)
