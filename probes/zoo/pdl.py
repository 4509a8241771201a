"""Mutants of one Triton GEMM launched with PDL: what it does before it waits, and right ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..problem import Device, Fp4Tensor, Problem

_HALF = 32
"""Bytes of codes along k in one step: 64 elements."""


@dataclass(frozen=True, slots=True)
class PdlGemm:
    """A backend around `_gemm_triton.gemm`. `when` and `drop` are that kernel's switches.

    `zeroing` stores zeros into the output first, with a kernel of its own; `own_output` computes
    into a buffer of the backend's that is kept full of zeros, and copies.
    """

    name: str
    when: str
    activation: str = "bf16"
    drop: str = ""
    rarely: int = 1
    zeroing: bool = False
    own_output: bool = False
    pdl: bool = True
    layout: str = "plain"
    distributions: tuple[str, ...] = ("triton",)

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda":
            return "needs a GPU"
        if self.pdl and (device.sm or 0) < 90:
            return "needs a GPU with programmatic dependent launch (SM90 or newer)"
        if problem.activation != self.activation:
            return f"takes {self.activation} activations"
        if problem.format != "nvfp4" or problem.groups != 1:
            return "computes dense NVFP4 problems only"
        return None

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        copy = weight.clone()
        buffer = torch.zeros(
            problem.m if self.own_output else 0,
            problem.n,
            dtype=problem.dtype,
            device=weight.codes.device,
        )
        return replace(copy, global_scale=copy.global_scale.reshape(1)), buffer

    def run(self, state: Any, a: Any, out: torch.Tensor, tactic: str) -> None:
        from . import _gemm_triton as kernels

        weight, buffer = state
        m, n = out.shape
        if m == 0:
            return
        target = buffer[:m] if self.own_output else out
        if self.zeroing:
            kernels.zero[(-(-m * n // 1024),)](
                out, m * n, BLOCK=1024, **({"launch_pdl": True} if self.pdl else {})
            )
        launch_gemm(self, a, weight, target)
        if self.own_output:
            out.copy_(target)
            target.zero_()


def launch_gemm(what: PdlGemm, a: Any, weight: Fp4Tensor, out: torch.Tensor) -> None:
    """Enqueue the GEMM; out (m, n) with m at least 1."""
    from . import _gemm_triton as kernels

    (m, n), k = out.shape, 2 * weight.codes.shape[1]
    if isinstance(a, Fp4Tensor):
        values, row_scales, row_alpha = a.codes, a.scales, a.global_scale
    else:
        values, row_scales, row_alpha = a, weight.scales, weight.global_scale
    bm, bn = (16, 64) if m <= 16 else (64, 64)
    kernels.gemm[(-(-m // bm), -(-n // bn))](
        values,
        row_scales,
        row_alpha,
        weight.codes,
        weight.scales,
        weight.global_scale,
        out,
        m,
        n,
        k,
        values.stride(0),
        row_scales.stride(0),
        what.rarely,
        WHEN=what.when,
        FP4=isinstance(a, Fp4Tensor),
        DROP=what.drop,
        BM=bm,
        BN=bn,
        HALF=_HALF,
        num_warps=4,
        num_stages=3,
        **({"launch_pdl": True} if what.pdl else {}),
    )
