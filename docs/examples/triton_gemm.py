"""An NVFP4 GEMM with 16-bit activations in Triton, for SM80 and newer: short rather than fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fp4tune.probes.problem import Device, Fp4Tensor, Problem

TACTICS = {"bm16-bn64": (16, 64), "bm64-bn128": (64, 128)}
"""Tile of the output by tactic: rows, columns."""
HALF_K = 32
"""Bytes of codes along k in one step: 64 elements, four NVFP4 blocks."""


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


@triton.jit(do_not_specialize=["m"])
def _gemm(
    a, codes, scales, global_scale, out, m, n, k,
    BM: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out (m, n) = global_scale * a (m, k) @ weight (n, k).T; even and odd k apart, so that no
    nibbles need to be interleaved. Strides are 64-bit: m * k may pass 2^31."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row, col = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, k // 2, HALF):
        byte = first + tl.arange(0, HALF)
        inside = (byte < k // 2)[:, None] & (col < n)
        packed = tl.load(codes + col * (k // 2) + byte[:, None], mask=inside, other=0)
        raw = tl.load(scales + col * (k // 16) + byte[:, None] // 8, mask=inside, other=0)
        scale = _e4m3(raw)
        at = a + row * k + 2 * byte[None, :]
        there = (row < m) & (byte < k // 2)[None, :]
        even = tl.load(at, mask=there, other=0)
        odd = tl.load(at + 1, mask=there, other=0)
        # A code times its scale has 6 significand bits: exact in bf16 and in fp16.
        acc = tl.dot(even, (_e2m1(packed & 15) * scale).to(even.dtype), acc)
        acc = tl.dot(odd, (_e2m1(packed >> 4) * scale).to(odd.dtype), acc)
    acc *= tl.load(global_scale)
    tl.store(out + row * n + col, acc.to(out.dtype.element_ty), mask=(row < m) & (col < n))


@dataclass(frozen=True, slots=True)
class Gemm:
    name: str = "example-triton"
    activation: str = "bf16"
    layout: str = "plain"
    distributions: tuple[str, ...] = ("triton",)

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or (device.sm or 0) < 80:
            return "it needs a CUDA GPU of SM80 or newer"
        if problem.format != "nvfp4" or problem.groups != 1:
            return "it computes dense NVFP4 problems only"
        return None

    def tactics(self, problem: Problem, device: Device) -> Sequence[str]:
        return tuple(TACTICS)

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        for n, k, dtype in dict.fromkeys((p.n, p.k, p.dtype) for p in problems):
            a = torch.zeros(1, k, dtype=dtype, device=device.torch)
            out = torch.empty(1, n, dtype=dtype, device=device.torch)
            codes = torch.zeros(n, k // 2, dtype=torch.uint8, device=device.torch)
            scales = torch.zeros(n, k // 16, dtype=torch.uint8, device=device.torch)
            one = torch.ones((), device=device.torch)
            for tactic in TACTICS:
                launch(codes, scales, one, a, out, tactic)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Fp4Tensor:
        return weight

    def run(self, state: Fp4Tensor, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        launch(state.codes, state.scales, state.global_scale, a, out, tactic)


def launch(
    codes: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    a: torch.Tensor,
    out: torch.Tensor,
    tactic: str,
) -> None:
    (m, k), n = a.shape, codes.shape[0]
    if m == 0:
        return
    bm, bn = TACTICS[tactic]
    grid = (triton.cdiv(m, bm), triton.cdiv(n, bn))
    _gemm[grid](a, codes, scales, global_scale, out, m, n, k, BM=bm, BN=bn, HALF=HALF_K)
