"""Wrong ones. Each is the floor with one mistake; its docstring says which, and the class of
real failures that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..floor import Blocks, Prepared, TorchExperts
from ..problem import GATES, ExpertsProblem
from ..tensors import ExpertWeights, Fp4Stack


class NextScales(TorchExperts):
    """The next expert's block scales for an expert's last block: a descriptor that was replaced
    while the tile before it was still being read."""

    name = "zoo-experts-next-scales"

    def scales(self, stack: Fp4Stack, experts: torch.Tensor) -> torch.Tensor:
        found = stack.scales[experts].clone()
        last = torch.ones_like(experts, dtype=torch.bool)
        last[:-1] = experts[1:] != experts[:-1]
        following = experts.roll(-1)
        last[-1] = False
        found[last] = stack.scales[following[last]]
        return found


class NextGlobal(TorchExperts):
    """Every expert's global scale is that of the one behind it."""

    name = "zoo-experts-next-global"

    def block_product(
        self, state: Prepared, stack: Fp4Stack, given: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        own = stack.global_scale[experts].view(-1, 1, 1)
        other = stack.global_scale.roll(-1)[experts].view(-1, 1, 1)
        return super().block_product(state, stack, given, experts) / own * other


class Unwritten(TorchExperts):
    """A row none of whose experts is here stays what it was."""

    name = "zoo-experts-unwritten"

    def run(
        self,
        state: Prepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        before = out.clone()
        super().run(state, x, ids, weights, out, tactic)
        here = ((ids >= 0) & (ids < state.problem.groups)).any(dim=1, keepdim=True)
        out.copy_(torch.where(here, out, before))


class ShortList(TorchExperts):
    """The sorted list is as long as if experts' slots filled their blocks."""

    name = "zoo-experts-short-list"

    def blocks(self, state: Prepared, ids: torch.Tensor) -> Blocks:
        found = super().blocks(state, ids)
        most = -(-ids.numel() // found.slots.shape[1]) + state.problem.groups // 2
        return Blocks(found.slots[:most], found.experts[:most])


class ShortScratch(TorchExperts):
    """Scratch for gemm2 is counted in tokens instead of slots: the last blocks share one."""

    name = "zoo-experts-short-scratch"

    def gemm2(
        self, state: Prepared, h: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        y = super().gemm2(state, h, ids, tactic)
        flat = y.view(-1, y.shape[-1])
        room = max(1, ids.shape[0] + 4)
        if flat.shape[0] > room:
            flat[room:] = flat[-1]
        return y


class OneBucket(TorchExperts):
    """The tactic of 3 and 4 tokens takes gates for ups."""

    name = "zoo-experts-one-bucket"

    def activate(self, state: Prepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        n = state.problem.n
        if h13.shape[0] in (3, 4) and state.problem.act.gated:
            h13 = torch.cat((h13[..., n:], h13[..., :n]), dim=-1)
        return super().activate(state, h13, tactic)


class ScaleTail(TorchExperts):
    """The last block scale of a row is its neighbour's: a tail that is loaded short."""

    name = "zoo-experts-scale-tail"

    def scales(self, stack: Fp4Stack, experts: torch.Tensor) -> torch.Tensor:
        found = stack.scales[experts].clone()
        found[..., -1] = found[..., -2]
        return found


class BehindScales(TorchExperts):
    """Scales are loaded four rows at a time from one row further, past the last expert's end."""

    name = "zoo-experts-behind-scales"

    def scales(self, stack: Fp4Stack, experts: torch.Tensor) -> torch.Tensor:
        found = stack.scales[experts].clone()
        blocks = found.shape[-1]
        whole = stack.scales.as_strided(
            (stack.scales.shape[0], stack.scales.shape[1] * blocks + 4),
            (stack.scales.stride(0), 1),
            stack.scales.storage_offset(),
        )
        nan = 0x7F if stack.format.scale == "e4m3" else 0xFF
        behind = (whole[experts, -1] == nan).view(-1, 1)
        found[:, -1] = torch.where(behind, nan, found[:, -1].int()).to(torch.uint8)
        return found


class EarlyFinalize(TorchExperts):
    """What is added up is read before gemm2's last block was stored."""

    name = "zoo-experts-early-finalize"

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
        h = self.activate(state, self.gemm1(state, x, ids, tactic), tactic)
        y = self.gemm2(state, h, ids, tactic)
        last = self.blocks(state, ids).slots[-1:].flatten()
        flat = torch.cat((y.view(-1, y.shape[-1]), y.new_zeros(1, y.shape[-1])))
        flat[last] = 0
        y = flat[:-1].view_as(y)
        out.copy_(self.finalize(state, y, ids, weights, tactic))


class Swapped(TorchExperts):
    """Gates and ups change places."""

    name = "zoo-experts-swapped"

    def activate(self, state: Prepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        n = state.problem.n
        if state.problem.act.gated:
            h13 = torch.cat((h13[..., n:], h13[..., :n]), dim=-1)
        else:
            h13 = h13.flip(-1)
        return super().activate(state, h13, tactic)


class _Scaled(TorchExperts):
    """The routed scaling to some power other than 1."""

    power = 1

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> Prepared:
        return super().prepare(weights, replace(problem, scaling=problem.scaling**self.power))


class ScaledTwice(_Scaled):
    """The routed scaling is applied by the router and once more at the end."""

    name = "zoo-experts-scaled-twice"
    power = 2


class NeverScaled(_Scaled):
    """The routed scaling is left to somebody else."""

    name = "zoo-experts-never-scaled"
    power = 0


class RouterTwice(TorchExperts):
    """The router's weight multiplies gemm2's result and what is added up."""

    name = "zoo-experts-router-twice"

    def factors(self, state: Prepared, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return weights * weights


class ForeignIsFirst(TorchExperts):
    """-1 is taken for the first expert."""

    name = "zoo-experts-foreign"

    def run(
        self,
        state: Prepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        super().run(state, x, ids.clamp(min=0), weights, out, tactic)


class Garbage(TorchExperts):
    """An expert that there is not is counted, too: the last blocks make room for its slots."""

    name = "zoo-experts-garbage"

    def blocks(self, state: Prepared, ids: torch.Tensor) -> Blocks:
        found = super().blocks(state, ids)
        over = (ids >= state.problem.groups).any()
        last = torch.arange(len(found.experts), device=ids.device) >= len(found.experts) // 2
        lost = (last & over).unsqueeze(1)
        return Blocks(torch.where(lost, ids.numel(), found.slots), found.experts)


class Once(TorchExperts):
    """An expert that a token names twice adds once."""

    name = "zoo-experts-once"

    def factors(self, state: Prepared, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        same = ids.unsqueeze(2) == ids.unsqueeze(1)
        again = torch.tril(same, diagonal=-1).any(dim=2)
        return weights.masked_fill(again, 0)


class Idle(TorchExperts):
    """Every expert multiplies a row of zeros at least, and adds it with a weight of zero."""

    name = "zoo-experts-idle"

    def results(self, state: Prepared, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        every = torch.arange(state.problem.groups, device=ids.device)
        stack = state.weights.w2
        zero = (self.values(state, stack, every)[:, 0, 0] * stack.global_scale * 0).sum()
        return y + zero.to(y.dtype)


class OtherModel(TorchExperts):
    """The activation is that of another model: with gpt-oss's limit, or without one."""

    name = "zoo-experts-other-activation"

    def activate(self, state: Prepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        own = state.problem.gate
        if not GATES[own].gated:
            return h13.float().clamp(min=0).to(h13.dtype)
        other = replace(state.problem, gate="swiglu-oai" if own == "swiglu" else "swiglu")
        return super().activate(replace(state, problem=other), h13, tactic)


class IntermediateTail(TorchExperts):
    """The intermediate size is rounded down to whole tiles of 64."""

    name = "zoo-experts-intermediate-tail"

    def activate(self, state: Prepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        h = super().activate(state, h13, tactic)
        kept = state.problem.n // 64 * 64
        if kept < state.problem.n:
            h[..., kept:] = 0
        return h


class BlockEdge(TorchExperts):
    """An expert that fills its blocks to the last row loses that row."""

    name = "zoo-experts-block-edge"

    def blocks(self, state: Prepared, ids: torch.Tensor) -> Blocks:
        found = super().blocks(state, ids)
        none = ids.numel()
        if found.slots.shape[1] < 8:
            return found
        slots = found.slots.clone()
        slots[:, -1] = none
        return Blocks(slots, found.experts)


class Keeps(TorchExperts):
    """Keeps something for each set of experts, in what it prepared."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}


class StalePlan(Keeps):
    """Where tokens go is worked out once a number of tokens: a graph that kept its routing."""

    name = "zoo-experts-stale-plan"

    def blocks(self, state: Prepared, ids: torch.Tensor) -> Blocks:
        key = id(state), ids.shape[0]
        if key not in self.kept:
            self.kept[key] = super().blocks(state, ids)
        found: Blocks = self.kept[key]
        return found


class OneScratch(Keeps):
    """One buffer between the GEMMs for each set of experts, whoever calls."""

    name = "zoo-experts-one-scratch"

    def activate(self, state: Prepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        h = super().activate(state, h13, tactic)
        key = id(state), h.shape
        if key not in self.kept:
            self.kept[key] = torch.empty_like(h)
        kept: torch.Tensor = self.kept[key]
        half = h.shape[-1] // 2
        kept[..., :half] = h[..., :half]
        for _ in range(8):  # as long as a kernel between two others takes
            kept[..., half:] = h[..., half:]
        return kept


class OneBadRow(TorchExperts):
    """A scale over the whole batch: one row of NaN spoils every other."""

    name = "zoo-experts-one-bad-row"

    def run(
        self,
        state: Prepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        super().run(state, x, ids, weights, out, tactic)
        if x.shape[0]:
            out += (x.abs().max() * 0).to(out.dtype)


MUTANTS = (
    NextScales,
    NextGlobal,
    Unwritten,
    ShortList,
    ShortScratch,
    OneBucket,
    ScaleTail,
    BehindScales,
    EarlyFinalize,
    Swapped,
    ScaledTwice,
    NeverScaled,
    RouterTwice,
    ForeignIsFirst,
    Garbage,
    Once,
    Idle,
    OtherModel,
    IntermediateTail,
    BlockEdge,
    StalePlan,
    OneScratch,
    OneBadRow,
)
