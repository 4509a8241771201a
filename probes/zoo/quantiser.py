"""A W4A4 GEMM with a quantiser of its own, which waits for the kernel before it, or does not."""

from __future__ import annotations

from typing import Any

import torch

from ..problem import NVFP4, Device, Fp4Tensor, Problem
from .pdl import PdlGemm

_BLOCK = 64


class QuantisingGemm:
    """`quantise` is an NVFP4 quantiser launched with PDL; the GEMM behind it is a `PdlGemm`."""

    activation = "fp4"
    layout = "plain"
    distributions = ("triton",)

    def __init__(self, name: str, waits: bool = True, when: str = "first") -> None:
        self.name = name
        self._waits = waits
        self._gemm = PdlGemm(name, when, "fp4")

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return self._gemm.unsupported(problem, device)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return self._gemm.prepare(weight, problem)

    def quantise(self, a: torch.Tensor, global_scale: torch.Tensor) -> Fp4Tensor:
        """a (m, k) 16-bit floats, contiguous; see `backends.Backend`."""
        from . import _quantise_triton as kernels

        m, k = a.shape
        codes = torch.empty(m, k // 2, dtype=torch.uint8, device=a.device)
        scales = torch.empty(m, k // 16, dtype=torch.uint8, device=a.device)
        if scales.numel():
            kernels.quantise[(-(-scales.numel() // _BLOCK),)](
                a,
                codes,
                scales,
                global_scale,
                scales.numel(),
                WAIT=self._waits,
                BLOCK=_BLOCK,
                launch_pdl=True,
            )
        return Fp4Tensor(NVFP4, codes, scales, global_scale)

    def run(self, state: Any, a: Any, out: torch.Tensor, tactic: str) -> None:
        self._gemm.run(state, a, out, tactic)
