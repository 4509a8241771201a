"""The floor: dequantise the chosen experts, and multiply, block by block.

``torch-experts`` runs anywhere and decodes by tables of the floors' own (`decoding`). The
slots (token, place in top-k) are sorted by expert and cut into blocks of one expert each; a block's
expert is dequantised for it. Where the slots go is known to the device alone, so there are as many
blocks as there can be, and those left over work on a row that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..decoding import Decoder
from ..problem import Device, Fp4Tensor
from .problem import ExpertsProblem
from .tensors import ExpertWeights, Fp4Stack

BLOCK = 128
"""Most slots of a block."""
_AT_ONCE = 1 << 26
"""Elements of dequantised weights at once."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The weights as they came, and tables that decode them."""

    problem: ExpertsProblem
    weights: ExpertWeights
    decode: Decoder


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sorted slots, cut into blocks.

    slots    int64 (blocks, size): token * top_k + place; the number of slots where there is none
    experts  int64 (blocks,)
    """

    slots: torch.Tensor
    experts: torch.Tensor


class TorchExperts:
    """Every stage by itself; `run` is one after another."""

    experts = True
    name = "torch-experts"
    layout = "plain"
    distributions = ()

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        return None

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> Prepared:
        decode = Decoder.of(weights.format, torch.float32, weights.codes.device)
        return Prepared(problem, weights, decode)

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
        h13 = self.gemm1(state, x, ids, tactic)
        h = self.activate(state, h13, tactic)
        y = self.gemm2(state, h, ids, tactic)
        out.copy_(self.finalize(state, y, ids, weights, tactic))

    def permute(
        self, state: Prepared, ids: torch.Tensor, tactic: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.blocks(state, ids)
        experts = found.experts.unsqueeze(1).expand_as(found.slots)
        return found.slots.flatten().int(), experts.flatten().int()

    def gemm1(
        self, state: Prepared, x: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        rows = x.repeat_interleave(ids.shape[1], dim=0)
        return self.product(state, state.weights.w13, state.weights.b13, rows, ids)

    def activate(self, state: Prepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        act, n = state.problem.act, state.problem.n
        wide = h13.float()
        if not act.gated:
            return wide.clamp(min=0).square().to(h13.dtype)
        gate, up = wide[..., :n], wide[..., n:]
        if act.limit is not None:
            gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        return (gate * torch.sigmoid(act.alpha * gate) * (up + act.offset)).to(h13.dtype)

    def gemm2(
        self, state: Prepared, h: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        rows = h.reshape(-1, h.shape[-1])
        return self.product(state, state.weights.w2, state.weights.b2, rows, ids)

    def finalize(
        self,
        state: Prepared,
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        here = ((ids >= 0) & (ids < state.problem.groups)).unsqueeze(2)
        factors = self.factors(state, ids, weights).unsqueeze(2)
        each = torch.where(here, self.results(state, y, ids).float() * factors, 0.0)
        return (each.sum(dim=1) * state.problem.scaling).to(y.dtype)

    def factors(self, state: Prepared, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What each slot's result is multiplied with, (tokens, top_k)."""
        return weights

    def results(self, state: Prepared, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The slots' results as they are added up, (tokens, top_k, hidden)."""
        return y

    def blocks(self, state: Prepared, ids: torch.Tensor) -> Blocks:
        """The slots of these tokens, in blocks; enqueues only."""
        groups, device = state.problem.groups, ids.device
        flat = ids.flatten().long()
        slots = flat.numel()
        size = min(BLOCK, 1 << max(0, ids.shape[0] - 1).bit_length())
        key = torch.where((flat >= 0) & (flat < groups), flat, groups)
        order = torch.argsort(key, stable=True)
        counts = torch.zeros(groups + 1, dtype=torch.int64, device=device)
        counts = counts.scatter_add_(0, key, torch.ones_like(key))[:groups]
        each = (counts + size - 1) // size
        ends = each.cumsum(0)
        most = int(ends[-1]) if device.type == "cpu" else min(slots, slots // size + groups)
        index = torch.arange(most, device=device)
        expert = torch.searchsorted(ends, index, right=True)
        there = (expert < groups).unsqueeze(1)
        expert = expert.clamp(max=groups - 1)
        within = (index - (ends - each)[expert]).unsqueeze(1) * size
        within = within + torch.arange(size, device=device)
        first = (counts.cumsum(0) - counts)[expert].unsqueeze(1)
        there = there & (within < counts[expert].unsqueeze(1))
        place = torch.where(there, first + within, slots)
        order = torch.cat((order, order.new_full((1,), slots)))
        return Blocks(order[place], expert)

    def product(
        self,
        state: Prepared,
        stack: Fp4Stack,
        bias: torch.Tensor | None,
        rows: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """Each slot's row times its expert's matrix, biases added: (tokens, top_k, rows of it)."""
        found = self.blocks(state, ids)
        size = stack.codes.shape[1]
        given = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
        out = rows.new_zeros(given.shape[0], size)
        step = max(1, _AT_ONCE // (size * rows.shape[1]))
        for first in range(0, len(found.experts), step):
            slots, experts = found.slots[first : first + step], found.experts[first : first + step]
            result = self.block_product(state, stack, given[slots].float(), experts)
            if bias is not None:
                result = result + bias[experts].unsqueeze(1)
            out[slots] = result.to(rows.dtype)
        return out[:-1].view(*ids.shape, size)

    def block_product(
        self, state: Prepared, stack: Fp4Stack, given: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        """float32 (blocks, size, rows of the matrix) of float32 (blocks, size, k)."""
        values = self.values(state, stack, experts)
        scale = stack.global_scale[experts].view(-1, 1, 1)
        return torch.bmm(given, values.transpose(1, 2)) * scale

    def values(self, state: Prepared, stack: Fp4Stack, experts: torch.Tensor) -> torch.Tensor:
        """The matrices of these experts without their global scales, float32."""
        codes, scales = stack.codes[experts], self.scales(stack, experts)
        one = stack.global_scale.new_ones(())
        flat = Fp4Tensor(stack.format, codes.flatten(0, 1), scales.flatten(0, 1), one)
        return state.decode(flat).view(*codes.shape[:2], -1)

    def scales(self, stack: Fp4Stack, experts: torch.Tensor) -> torch.Tensor:
        """The block scales of these experts, raw."""
        return stack.scales[experts]
