"""Routed experts in Triton, NVFP4, for SM80 and newer: short rather than fast."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.grouped.tensors import ExpertWeights, Fp4Stack
from fp4tune.probes.problem import Device

COLUMNS, HALF_K = 32, 64
"""Columns of a program, and bytes of codes along k that it reads at once."""


@triton.jit
def _e2m1(code):
    """Codes 0..15 to float32. Without the sign e2m1 is the largest of three straight lines."""
    size = (code & 7).to(tl.float32)
    value = tl.maximum(tl.maximum(0.5 * size, size - 2), 2 * size - 8)
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def _e4m3(byte):
    """Scale bytes to float32, by hand: SM80 has no fp8. Subnormals are m * 2^-9."""
    bits = byte.to(tl.int32) & 0x7F
    normal = ((bits + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    return tl.where(bits < 8, bits.to(tl.float32) * 0.001953125, normal)


@triton.jit(do_not_specialize=["each"])
def _rows(
    x, ids, codes, scales, global_scale, bias, out, each, groups, n, k,
    BIASED: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One slot's row of x, which is that of `each` slots, times its expert's matrix: COLUMNS of n.
    Slots of experts that are elsewhere are left as they are."""
    slot = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.load(ids + slot).to(tl.int64)
    if (expert >= 0) & (expert < groups):
        row = (expert * n + col)[:, None]
        acc = tl.zeros((COLUMNS,), dtype=tl.float32)
        for first in range(0, k // 2, HALF):
            byte = first + tl.arange(0, HALF)
            there = byte < k // 2
            inside = (col < n)[:, None] & there[None, :]
            packed = tl.load(codes + row * (k // 2) + byte[None, :], mask=inside, other=0)
            raw = tl.load(scales + row * (k // 16) + byte[None, :] // 8, mask=inside, other=0)
            at = x + slot // each * k + 2 * byte
            even = tl.load(at, mask=there, other=0).to(tl.float32)[None, :]
            odd = tl.load(at + 1, mask=there, other=0).to(tl.float32)[None, :]
            acc += tl.sum((_e2m1(packed & 15) * even + _e2m1(packed >> 4) * odd) * _e4m3(raw), 1)
        acc *= tl.load(global_scale + expert)
        if BIASED:
            acc += tl.load(bias + expert * n + col, mask=col < n, other=0)
        tl.store(out + slot * n + col, acc.to(out.dtype.element_ty), mask=col < n)


@dataclass(frozen=True, slots=True)
class Experts:
    experts: bool = True
    name: str = "example-triton-experts"
    layout: str = "plain"
    distributions: tuple[str, ...] = ("triton",)

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if device.kind != "cuda" or (device.sm or 0) < 80:
            return "it needs a CUDA GPU of SM80 or newer"
        if problem.format != "nvfp4":
            return "it computes NVFP4 experts only"
        return None

    def prepare(
        self, weights: ExpertWeights, problem: ExpertsProblem
    ) -> tuple[ExpertWeights, ExpertsProblem]:
        return weights, problem

    def run(
        self,
        state: tuple[ExpertWeights, ExpertsProblem],
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        if x.shape[0]:
            h = self.activate(state, self.gemm1(state, x, ids, tactic), tactic)
            out.copy_(self.finalize(state, self.gemm2(state, h, ids, tactic), ids, weights, tactic))

    # Where it can be cut, each stage is checked by itself, and attacked by itself.

    def gemm1(
        self,
        state: tuple[ExpertWeights, ExpertsProblem],
        x: torch.Tensor,
        ids: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        given, problem = state
        return rows(x, ids, given.w13, given.b13, ids.shape[1], problem.groups)

    def activate(
        self, state: tuple[ExpertWeights, ExpertsProblem], h13: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        act, n = state[1].act, state[1].n
        if not act.gated:
            return h13.float().clamp(min=0).square().to(h13.dtype)
        gate, up = h13[..., :n].float(), h13[..., n:].float()  # gate rows come first
        if act.limit is not None:
            gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        return (gate * torch.sigmoid(act.alpha * gate) * (up + act.offset)).to(h13.dtype)

    def gemm2(
        self,
        state: tuple[ExpertWeights, ExpertsProblem],
        h: torch.Tensor,
        ids: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        given, problem = state
        return rows(h, ids, given.w2, given.b2, 1, problem.groups)

    def finalize(
        self,
        state: tuple[ExpertWeights, ExpertsProblem],
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        # Slots of experts that are elsewhere were never written: masked, and not multiplied by 0.
        here = ((ids >= 0) & (ids < state[1].groups)).unsqueeze(2)
        total = torch.where(here, y.float() * weights.unsqueeze(2), 0.0).sum(dim=1)
        return (total * state[1].scaling).to(y.dtype)


def rows(
    x: torch.Tensor,
    ids: torch.Tensor,
    stack: Fp4Stack,
    bias: torch.Tensor | None,
    each: int,
    groups: int,
) -> torch.Tensor:
    """(tokens, top_k, rows of the matrix): every slot's row of x, that of `each` slots, times its
    expert's matrix."""
    n, k = stack.codes.shape[1], 2 * stack.codes.shape[2]
    out = torch.empty(*ids.shape, n, dtype=x.dtype, device=x.device)
    x, ids = x.contiguous(), ids.contiguous()
    _rows[(ids.numel(), triton.cdiv(n, COLUMNS))](
        x, ids, stack.codes, stack.scales, stack.global_scale,
        stack.global_scale if bias is None else bias, out, each, groups, n, k,
        BIASED=bias is not None, COLUMNS=COLUMNS, HALF=HALF_K,
    )  # fmt: skip
    return out
