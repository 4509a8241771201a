"""Wrong ones that go by how often they were called, by who calls, and by what came before."""

from __future__ import annotations

import threading
import time
from itertools import count
from typing import Any

import torch

from ..floor import Prepared, TorchExperts
from ..problem import ExpertsProblem
from ..tensors import ExpertWeights, Fp4Stack
from .mutants import Keeps


class Seldom(TorchExperts):
    """What is seldom wrong: the device counts the calls, in graphs, too."""

    every = 2000

    def __init__(self) -> None:
        self.calls: dict[str, torch.Tensor] = {}

    def late(self, device: torch.device) -> torch.Tensor:
        """bool (): whether this is the call in so many; counts it."""
        key = str(device)
        if key not in self.calls:
            self.calls[key] = torch.zeros((), dtype=torch.int64, device=device)
        self.calls[key] += 1
        return self.calls[key] % self.every == 0


class SeldomNextScales(Seldom):
    """Once in 2,000 calls the first block has the scales of the expert behind: FlashInfer 5438, as
    seldom as it may be."""

    name = "zoo-experts-seldom-next-scales"

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> Prepared:
        self.late(weights.codes.device)
        return super().prepare(weights, problem)

    def scales(self, stack: Fp4Stack, experts: torch.Tensor) -> torch.Tensor:
        found = stack.scales[experts].clone()
        other = stack.scales[(experts[:1] + 1) % stack.codes.shape[0]]
        found[:1] = torch.where(self.late(found.device), other, found[:1])
        return found


class SeldomUnwritten(Seldom):
    """Once in 3,000 calls the first token's row stays what it was."""

    name = "zoo-experts-seldom-unwritten"
    every = 3000

    def run(
        self,
        state: Prepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        before = out[:1].clone()
        super().run(state, x, ids, weights, out, tactic)
        out[:1] = torch.where(self.late(out.device), before, out[:1])


class SeldomEarly(Seldom):
    """Once in 1,000 calls what is added up is read before gemm2's last slot was stored."""

    name = "zoo-experts-seldom-early-finalize"
    every = 1000

    def results(self, state: Prepared, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        flat = y.flatten(0, 1).clone()
        flat[-1:] = torch.where(self.late(y.device), 0.0, flat[-1:])
        return flat.view_as(y)


class NumberWraps(TorchExperts):
    """Numbers its calls in 10 bits, and takes number 0 for a batch without tokens."""

    name = "zoo-experts-counter"
    mask = (1 << 10) - 1

    def __init__(self) -> None:
        self.calls = count(1)

    def run(
        self,
        state: Prepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        if next(self.calls) & self.mask:
            super().run(state, x, ids, weights, out, tactic)


class AnotherLayer(Keeps):
    """Keeps w2's values by shape: a second layer of it gets those of the first."""

    name = "zoo-experts-another-layer"

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> Prepared:
        own = super().prepare(weights, problem)
        key = weights.w2.codes.shape, weights.codes.device
        self.kept.setdefault(key, own)
        return own

    def gemm2(
        self, state: Prepared, h: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        key = state.weights.w2.codes.shape, h.device
        first: Prepared = self.kept[key]
        shown = first if h.shape[0] == 1 else state
        return super().gemm2(shown, h, ids, tactic)


class OneLock(Keeps):
    """One scratch for every layer and stream between gemm2 and finalize: layers share a lock that
    counts for nobody."""

    name = "zoo-experts-one-lock"

    def results(self, state: Prepared, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        key = y.shape, y.device
        if key not in self.kept:
            self.kept[key] = torch.empty_like(y)
        kept: torch.Tensor = self.kept[key]
        half = y.shape[-1] // 2
        kept[..., :half] = y[..., :half]
        for _ in range(8):  # as long as a kernel between two others takes
            kept[..., half:] = y[..., half:]
        return kept


class HalfMadePlan(Keeps):
    """Makes the decoder of a set of experts at the first call, and a second caller sees it half
    made."""

    name = "zoo-experts-half-made"

    def run(
        self,
        state: Prepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        ready = self.kept.get(id(state))
        if ready is None:
            self.kept[id(state)] = False
            time.sleep(0.004)
            self.kept[id(state)] = ready = True
        if ready:
            super().run(state, x, ids, weights, out, tactic)
        else:
            out.zero_()


class OwnThread(TorchExperts):
    """Is set up for the thread that prepares; the first call of any other gives zeros."""

    name = "zoo-experts-own-thread"

    def __init__(self) -> None:
        self.local = threading.local()

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> Prepared:
        self.local.ready = True
        return super().prepare(weights, problem)

    def run(
        self,
        state: Prepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        if getattr(self.local, "ready", False):
            super().run(state, x, ids, weights, out, tactic)
        else:
            self.local.ready = True
            out.zero_()


class SumsUnwritten(TorchExperts):
    """Slots of experts on other ranks are left as the memory was, and added with their weight."""

    name = "zoo-experts-sums-unwritten"

    def finalize(
        self,
        state: Prepared,
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        here = ((ids >= 0) & (ids < state.problem.groups)).unsqueeze(2)
        left = torch.empty_like(y)
        held = torch.where(here, y, left)
        total = (held.float() * weights.unsqueeze(2)).sum(dim=1)
        return (total * state.problem.scaling).to(y.dtype)


class Stranded(Keeps):
    """Keeps what is between the GEMMs in one buffer, and makes a larger one when more tokens come:
    graphs captured before go on with the old one."""

    name = "zoo-experts-stranded"

    def activate(self, state: Prepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        h = super().activate(state, h13, tactic)
        flat = h.flatten(0, 1)
        held: Any = self.kept.get(id(state))
        if held is None or held.shape[0] < flat.shape[0]:
            held = self.kept[id(state)] = torch.empty_like(flat)
        part: torch.Tensor = held[: flat.shape[0]]
        part.copy_(flat)
        return part.view_as(h)


class RouterOfNeighbour(TorchExperts):
    """A token's rows are weighed with the router's weights of the token before."""

    name = "zoo-experts-router-neighbour"

    def factors(self, state: Prepared, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        factor = weights.amax(dim=1, keepdim=True)
        moved = weights / factor * factor.roll(1, 0)
        return moved


class Renormalised(TorchExperts):
    """The router's weights are made to add up to what their largest is."""

    name = "zoo-experts-renormalised"

    def factors(self, state: Prepared, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = weights.sum(dim=1, keepdim=True)
        return weights / total


class NoBend(TorchExperts):
    """The activation is its argument where that is positive, and else zero."""

    name = "zoo-experts-no-bend"

    def activate(self, state: Prepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        act, n = state.problem.act, state.problem.n
        if not act.gated:
            return super().activate(state, h13, tactic) * (1 + 2.0**-4)
        gate, up = h13[..., :n].float(), h13[..., n:].float()
        if act.limit is not None:
            gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        return (gate.clamp(min=0) * (up + act.offset)).to(h13.dtype)


class Fp8Tokens(TorchExperts):
    """Tokens are cast to e4m3 on the way in."""

    name = "zoo-experts-fp8-tokens"

    def gemm1(
        self, state: Prepared, x: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        return super().gemm1(state, x.to(torch.float8_e4m3fn).to(x.dtype), ids, tactic)


class CountOf8Bits(TorchExperts):
    """An expert's tokens are counted in 8 bits: what has 256 has none."""

    name = "zoo-experts-count-of-8-bits"

    def factors(self, state: Prepared, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        key = ids.clamp(-1, state.problem.groups).flatten().long() + 1
        counts = torch.zeros(state.problem.groups + 2, dtype=torch.int64, device=ids.device)
        counts.scatter_add_(0, key, torch.ones_like(key))
        lost = (counts[key] % 256 == 0).view(ids.shape)
        return weights.masked_fill(lost, 0)


class OneMOnly(TorchExperts):
    """At 37 tokens the last of them has its experts' results in the other order."""

    name = "zoo-experts-one-m"

    def results(self, state: Prepared, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if y.shape[0] == 37:
            y = torch.cat((y[:-1], y[-1:].flip(1) * 2))
        return y


RARE = (
    SeldomNextScales,
    SeldomUnwritten,
    SeldomEarly,
    NumberWraps,
    AnotherLayer,
    OneLock,
    HalfMadePlan,
    OwnThread,
    SumsUnwritten,
    Stranded,
    RouterOfNeighbour,
    Renormalised,
    NoBend,
    Fp8Tokens,
    CountOf8Bits,
    OneMOnly,
)
