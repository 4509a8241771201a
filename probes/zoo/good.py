"""Known-good ones that look suspicious: a prober that flags them is of no use either."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..problem import Fp4Tensor, Problem
from .floor import Right, decoded, partial_products

_STEP = 64


class Bf16Sums(Right):
    """Rounds partial sums to bf16, like humming."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        _sum_up(state, partial_products(state, a, _STEP), out)


class AtomicOrder(Right):
    """Adds up split-k parts in bf16 in whatever order they come: no two launches need agree."""

    random = random.Random(1)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        parts = list(range(-(-a.shape[1] // _STEP)))
        self.random.shuffle(parts)
        _sum_up(state, partial_products(state, a, _STEP, parts), out)


class RoundsAlpha(Right):
    """Rounds the global scale to bf16, like Marlin."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        rounded = weight.global_scale.bfloat16().float()
        return super().prepare(replace(weight, global_scale=rounded), problem)


class OwnBuffer(Right):
    """Computes into memory of its own, and copies to the output at the end."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        out.copy_(self.product(state, a, out.shape[1]))


class InFp64(Right):
    """Multiplies in fp64; on a CPU one row after the other, without a matrix product."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight, alpha = decoded(state).double(), state.tensor.global_scale
        if a.is_cuda:
            torch.mul(a.double() @ weight.t(), alpha, out=out)
            return
        for row in range(a.shape[0]):
            out[row] = ((weight * a[row].double()).sum(dim=1) * alpha).to(out.dtype)


def _sum_up(state: Any, products: Iterable[torch.Tensor], out: torch.Tensor) -> None:
    """``out = global_scale * sum(products)``, each sum rounded to bf16."""
    total = torch.zeros(out.shape, dtype=torch.bfloat16, device=out.device)
    for product in products:
        total = (total.float() + product).bfloat16()
    torch.mul(total.float(), state.tensor.global_scale, out=out)


class ScaledByRow(Right):
    """Divides each row by a power of two near its largest value, and multiplies again at the end.

    A row of zeros, of infinities or of NaN is left as it is.
    """

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        largest = a.float().abs().amax(dim=1, keepdim=True) if a.numel() else a.float()[:, :1]
        usual = (largest > 0) & largest.isfinite()
        power = torch.where(usual, largest, 1.0).frexp().exponent.clamp(-60, 60)
        scaled = torch.ldexp(a.float(), -power).to(a.dtype)
        weight = decoded(state)
        total = scaled.float() @ weight.t() * state.tensor.global_scale
        out.copy_(torch.ldexp(total, power))


class CutsItsOutput(Right):
    """Sums up in fp32 and cuts the sum to the output's dtype, which is rounding towards zero."""

    bits = 16

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        if out.dtype != torch.bfloat16:
            super().run(state, a, out, tactic)
            return
        total = a.float() @ decoded(state).t() * state.tensor.global_scale
        out.copy_((total.view(torch.int32) >> self.bits << self.bits).view(torch.float32))


class CutsABitMore(CutsItsOutput):
    """Cuts one bit more than the output's dtype asks for."""

    bits = 17
