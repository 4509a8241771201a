"""What a grouped backend is given: the experts' weights, and routed tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..formats import dequantise
from ..problem import FORMATS, Format, Fp4Tensor
from .problem import ExpertsProblem

SIGNS = 0x88
"""The sign bits of both e2m1 codes of a byte."""


def _by_parts(t: torch.Tensor, shift: int, n: int) -> torch.Tensor:
    """t (experts, parts of n, ...) with each part moved down by `shift`."""
    return t.unflatten(1, (-1, n)).roll(shift, 2).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class Fp4Stack:
    """One FP4 matrix an expert, in the plain layout; see `Fp4Tensor`.

    codes         uint8 (experts, rows, k/2)
    scales        uint8 (experts, rows, k/block)
    global_scale  float32 (experts,): 1 in MXFP4
    """

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor

    def expert(self, index: int) -> Fp4Tensor:
        """One expert's matrix (rows, k); views."""
        return Fp4Tensor(
            self.format, self.codes[index], self.scales[index], self.global_scale[index]
        )

    def inner(self, shift: int, n: int) -> Fp4Stack:
        """With the rows of gates moved down by `shift`, and those of ups; each has n rows."""
        codes, scales = (_by_parts(each, shift, n) for each in (self.codes, self.scales))
        return Fp4Stack(self.format, codes, scales, self.global_scale)

    def clone(self) -> Fp4Stack:
        parts = (self.codes.clone(), self.scales.clone(), self.global_scale.clone())
        return Fp4Stack(self.format, *parts)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The experts of one layer.

    w13  (experts, 2 * intermediate, hidden), gate rows first; (experts, intermediate, hidden) where
         the activation does not gate
    w2   (experts, hidden, intermediate)
    b13, b2  float32 (experts, rows of w13), (experts, hidden); None without biases
    """

    w13: Fp4Stack
    w2: Fp4Stack
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None

    @property
    def format(self) -> Format:
        return self.w13.format

    @property
    def codes(self) -> torch.Tensor:
        """Those of w13: where the experts are, as of any weight."""
        return self.w13.codes

    @property
    def groups(self) -> int:
        return self.w13.codes.shape[0]

    def clone(self) -> ExpertWeights:
        biases = (None if b is None else b.clone() for b in (self.b13, self.b2))
        return ExpertWeights(self.w13.clone(), self.w2.clone(), *biases)

    def moved(self, shift: int, negated: bool) -> ExpertWeights:
        """In memory of its own, with the rows of w2 moved down by `shift`, and negated or not: what
        comes out has its columns moved, and the other sign. The intermediate columns are moved by
        whole blocks, which shows in w13 and in nothing that comes out."""
        own, block = self.clone(), self.format.block
        n = 2 * own.w2.codes.shape[2]
        inner = shift % (n // block) * block
        w13, w2, b2 = own.w13.inner(inner, n), own.w2, own.b2
        codes = w2.codes.roll((shift, inner // 2), (1, 2))
        scales = w2.scales.roll((shift, inner // block), (1, 2))
        b13 = None if own.b13 is None else _by_parts(own.b13, inner, n)
        b2 = None if b2 is None else b2.roll(shift, 1)
        if negated:
            codes, b2 = codes ^ SIGNS, None if b2 is None else -b2
        return ExpertWeights(w13, replace(w2, codes=codes, scales=scales), b13, b2)


@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens with where they go: what stands where a dense call has its activation.

    x        (tokens, hidden) in the problem's 16-bit dtype
    ids      int32 (tokens, top_k)
    weights  float32 (tokens, top_k): of the router, without the routed scaling
    spoilt   bool (tokens, 1): rows of which nothing is asked; None where there are none
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    spoilt: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    def __getitem__(self, part: slice) -> Routed:
        """Some of the tokens; views."""
        spoilt = None if self.spoilt is None else self.spoilt[part]
        return replace(
            self, x=self.x[part], ids=self.ids[part], weights=self.weights[part], spoilt=spoilt
        )


def matrix(stack: Fp4Stack, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's values (rows, k), global scale included."""
    return dequantise(stack.expert(expert), dtype)


def zero_experts(problem: ExpertsProblem, device: torch.device) -> ExpertWeights:
    """Experts of zeros, for what is compiled for a layer before it has any."""
    fmt, groups = FORMATS[problem.format], problem.groups

    def stack(rows: int, k: int) -> Fp4Stack:
        codes, scales = (
            torch.zeros(groups, rows, k // per, dtype=torch.uint8, device=device)
            for per in (2, fmt.block)
        )
        return Fp4Stack(fmt, codes, scales, torch.ones(groups, device=device))

    def bias(rows: int) -> torch.Tensor | None:
        return torch.zeros(groups, rows, device=device) if problem.act.biased else None

    rows13, rows2 = problem.rows13, problem.k
    w13, w2 = stack(rows13, problem.k), stack(rows2, problem.n)
    return ExpertWeights(w13, w2, bias(rows13), bias(rows2))
