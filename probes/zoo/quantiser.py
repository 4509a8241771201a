"""A W4A4 GEMM with a quantiser of its own, which waits for the kernel before it, or does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..backends.torch.dequant import not_dense, torch_dequant_w4a4
from ..formats import dequantise, quantise
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


class OwnQuantiser:
    """Right in everything: the floor of W4A4 behind a quantiser of its own, on any device."""

    activation = "fp4"
    layout = "plain"
    distributions: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.floor = torch_dequant_w4a4()

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return not_dense(self, problem)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return self.floor.prepare(weight, problem), weight.format

    def quantise(self, a: torch.Tensor, global_scale: torch.Tensor) -> Any:
        """The activation (m, k) in NVFP4."""
        return quantise(a, NVFP4, global_scale, check=False)

    def run(self, state: Any, a: Any, out: torch.Tensor, tactic: str) -> None:
        self.floor.run(state[0], a, out, "fp32")


class FirstGlobalScale(OwnQuantiser):
    """Keeps the first global scale for each k, as if it were the weight's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[int, torch.Tensor] = {}

    def quantise(self, a: torch.Tensor, global_scale: torch.Tensor) -> Any:
        return super().quantise(a, self.kept.setdefault(a.shape[1], global_scale.clone()))


class CutsCodes(OwnQuantiser):
    """Rounds codes towards zero."""

    def quantise(self, a: torch.Tensor, global_scale: torch.Tensor) -> Any:
        right = super().quantise(a, global_scale)
        larger = dequantise(right, torch.float32).abs() > a.float().abs()
        low, high = (larger[:, half::2].to(torch.uint8) for half in (0, 1))
        return replace(right, codes=right.codes - low - (high << 4))


class ScalesOfTheRowAbove(OwnQuantiser):
    """Pairs the codes of a row with the block scales of the row above, but for the first two."""

    def quantise(self, a: torch.Tensor, global_scale: torch.Tensor) -> Any:
        right = super().quantise(a, global_scale)
        scales = right.scales.clone()
        scales[2:] = right.scales[1:-1]
        return replace(right, scales=scales)


class AlphaOfTheWeight(OwnQuantiser):
    """Takes the activation's global scale that came first for one that belongs to the weight."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return *super().prepare(weight, problem), []

    def run(self, state: Any, a: Any, out: torch.Tensor, tactic: str) -> None:
        *own, kept = state
        if not kept:
            kept.append(a.global_scale.clone())
        super().run(own, replace(a, global_scale=kept[0]), out, tactic)


class AlphaOfThePlan(AlphaOfTheWeight):
    """Has a plan for each weight and m, with the activation's global scale that came first."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        *own, _ = super().prepare(weight, problem)
        return *own, {}

    def run(self, state: Any, a: Any, out: torch.Tensor, tactic: str) -> None:
        *own, plans = state
        scale = plans.setdefault(out.shape[0], a.global_scale.clone())
        OwnQuantiser.run(self, own, replace(a, global_scale=scale), out, tactic)


class AlphaOfThePair(OwnQuantiser):
    """Right in everything: keeps the product of the two global scales for each activation."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[int, torch.Tensor] = {}

    def run(self, state: Any, a: Any, out: torch.Tensor, tactic: str) -> None:
        # The tensor is kept, so that no other has its address.
        scale = self.kept.setdefault(id(a.global_scale), a.global_scale)
        super().run(state, replace(a, global_scale=scale), out, tactic)
