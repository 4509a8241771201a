"""The right answer: the exact product, and how far from it an output may be.

The reference is a float64 matrix product of operands dequantised by `formats`; it shares no kernel,
layout or data type with what it judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..data.exact import WIDTHS
from ..data.operands import Operands
from ..formats import dequantise
from ..problem import Fp4Tensor, Problem
from .rounding import (
    OVERFLOW,
    SMALLEST_SUBNORMAL,
    UNIT_ROUNDOFF,
    round_down,
    round_nearest,
    round_up,
)
from .tiles import TILE_LIMIT, tile_error, tile_limit

__all__ = [
    "TILE_LIMIT",
    "Expectation",
    "alpha_of",
    "expect",
    "faithful",
    "grade",
    "reference64",
    "right",
    "spread",
    "tile_error",
    "tile_limit",
    "tolerance",
    "without_tensor_cores",
]

_COLUMNS = 4096
"""Columns (rows of the weight) worked on at once: 4096 x 28672 in float64 is 0.94 GB."""
_EPS32 = 2.0**-23
_EPS64 = 2.0**-53


@dataclass(frozen=True, slots=True)
class Expectation:
    """What an output may be: an element is right iff ``lo <= out <= hi``, as values.

    lo, hi  (m, n) in the output dtype. On exact problems both are the correctly rounded result (one
            tensor); otherwise the smallest and largest values of the dtype within the tolerance
    exact   whether lo is hi, bit for bit but for the sign of zero
    ref     float32 (m, n), the centre, for `tile_error`; None on exact problems, where lo is it

    NaN compares false and so is never right; -0 equals +0. An infinity is right only where the
    reference, within its tolerance, rounds to infinity in the output dtype.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    exact: bool
    ref: torch.Tensor | None = None

    def window(self, start: int, stop: int) -> Expectation:
        """The expectation for rows [start, stop): views."""
        lo = self.lo[start:stop]
        hi = lo if self.exact else self.hi[start:stop]
        ref = None if self.ref is None else self.ref[start:stop]
        return replace(self, lo=lo, hi=hi, ref=ref)


def alpha_of(operands: Operands) -> float:
    """The product's factor: the weight's global scale, times the activation's if it has one.

    Each is a float32; the product is exact in float64.
    """
    alpha = _scale_value(operands.weight.global_scale)
    if isinstance(operands.a, Fp4Tensor):
        alpha *= _scale_value(operands.a.global_scale)
    return alpha


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Global scales that were read, each with the version it then had: reading waits for the device."""


def _scale_value(scale: torch.Tensor) -> float:
    if scale.is_inference():  # has no version
        return float(scale)
    version, value = _read.get(scale, (None, 0.0))
    if version != scale._version:
        version, value = scale._version, float(scale)
        _read[scale] = version, value
    return float(value)


def _left_operand(operands: Operands, start: int, stop: int) -> torch.Tensor:
    a = operands.a
    if isinstance(a, Fp4Tensor):
        part = replace(a, codes=a.codes[start:stop], scales=a.scales[start:stop])
        return dequantise(part, torch.float64, with_global=False)
    return a[start:stop].double()


def _output_parts(
    operands: Operands, chunk_rows: int
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """(rows, columns, A float64, B float64) of each part of the output, without global scales."""
    weight, a = operands.weight, operands.a
    m = (a.codes if isinstance(a, Fp4Tensor) else a).shape[0]
    n = weight.codes.shape[0]
    whole = _left_operand(operands, 0, m) if m <= chunk_rows else None
    for first in range(0, n, _COLUMNS):
        cols = slice(first, min(n, first + _COLUMNS))
        part = replace(weight, codes=weight.codes[cols], scales=weight.scales[cols])
        b = dequantise(part, torch.float64, with_global=False)
        for start in range(0, m, chunk_rows):
            rows = slice(start, min(m, start + chunk_rows))
            yield (
                rows,
                cols,
                whole if whole is not None else _left_operand(operands, start, rows.stop),
                b,
            )


def _output_shape(operands: Operands, problem: Problem) -> tuple[int, int]:
    """The output's (m, n), after checking that the operands fit the problem."""
    a = operands.a
    m, k = a.shape
    n, kb = operands.weight.shape
    if (k, n, kb) != (problem.k, problem.n, problem.k):
        raise ValueError(
            f"operands of {m}x{k} and {n}x{kb} do not fit n={problem.n}, k={problem.k}"
        )
    return m, n


def reference64(
    operands: Operands, problem: Problem, chunk_rows: int = 4096, alpha: float | None = None
) -> torch.Tensor:
    """``alpha * A @ B.T`` in float64 (m, n) on the operands' device; m is the operands' own.

    `alpha` replaces the operands' factor, to judge a backend that rounds it. Raises ValueError
    where operands do not fit the problem.
    """
    m, n = _output_shape(operands, problem)
    factor = alpha_of(operands) if alpha is None else alpha
    out = torch.empty(m, n, dtype=torch.float64, device=operands.weight.codes.device)
    for rows, cols, a, b in _output_parts(operands, chunk_rows):
        out[rows, cols] = (a @ b.T).mul_(factor)
    return out


def spread(operands: Operands, problem: Problem, chunk_rows: int = 4096) -> torch.Tensor:
    """``|alpha| * sqrt((A*A) @ (B*B).T)`` in float32 (m, n): what a sum of products of random signs
    comes to."""
    m, n = _output_shape(operands, problem)
    factor = abs(alpha_of(operands))
    out = torch.empty(m, n, dtype=torch.float32, device=operands.weight.codes.device)
    for rows, cols, a, b in _output_parts(operands, chunk_rows):
        out[rows, cols] = ((a * a) @ (b * b).T).sqrt_().mul_(factor).float()
    return out


def expect(
    operands: Operands,
    problem: Problem,
    chunk_rows: int = 4096,
    alpha: float | None = None,
    roundings: int = 1,
) -> Expectation:
    """What a backend's output for `operands` may be, computed on their device.

    Exact problems: the float64 product, correctly rounded. Families: per element, with c and S the
    float64 sums of a*b and |a||b|, g = k*2^-23/(1-k*2^-23) for truncating float32 accumulation in
    any order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1, unit roundoff
    2^-23 for rounding towards zero) and g53 the same for float64, the sum may be off by

        e = |alpha| * (g*S + 2*2^-23*(|c| + g*S) + g53*S)

    (its accumulation, alpha's product and multiplication, this reference), and rounding the output
    adds u*(|alpha*c| + e) and half the smallest subnormal. lo and hi are rounded inwards, so that
    exactly the values of the output dtype within the tolerance are right.

    `alpha` replaces the operands' factor, and `roundings` is how often the result is rounded to the
    output dtype on its way: 2 for a kernel that rounds the sum, then its product with alpha. On
    exact problems, where alpha is a power of two, neither changes the answer.

    Memory: 4096 columns and `chunk_rows` rows in float64 at once, besides the result. Raises
    ValueError where operands do not fit the problem.
    """
    m, n = _output_shape(operands, problem)
    dtype, device = problem.dtype, operands.weight.codes.device
    factor = alpha_of(operands) if alpha is None else alpha
    lo = torch.empty(m, n, dtype=dtype, device=device)
    if operands.width is not None:
        for rows, cols, a, b in _output_parts(operands, chunk_rows):
            lo[rows, cols] = round_nearest((a @ b.T).mul_(factor), dtype)
        return Expectation(lo, lo, exact=True)
    hi = torch.empty_like(lo)
    ref = torch.empty(m, n, dtype=torch.float32, device=device)
    for rows, cols, a, b in _output_parts(operands, chunk_rows):
        centre = a @ b.T
        sizes = a.abs() @ b.T.abs()
        slack = tolerance(centre, sizes, factor, problem.k, dtype, roundings)
        centre *= factor
        ref[rows, cols] = centre.float()
        lo[rows, cols] = _inward(centre - slack, dtype, up=True)
        hi[rows, cols] = _inward(centre + slack, dtype, up=False)
    return Expectation(lo, hi, exact=False, ref=ref)


def faithful(operands: Operands, problem: Problem, chunk_rows: int = 4096) -> Expectation:
    """What an exact problem's outputs may be for a kernel that rounds its sums once, but not to
    nearest: the neighbours of each float64 product, above and below.

    Its bound is one unit in the last place. A short accumulator is not within it where sums cancel.
    """
    m, n = _output_shape(operands, problem)
    factor = alpha_of(operands)
    lo = torch.empty(m, n, dtype=problem.dtype, device=operands.weight.codes.device)
    hi = torch.empty_like(lo)
    for rows, cols, a, b in _output_parts(operands, chunk_rows):
        product = (a @ b.T).mul_(factor)
        lo[rows, cols] = round_down(product, problem.dtype)
        hi[rows, cols] = round_up(product, problem.dtype)
    return Expectation(lo, hi, exact=False, ref=((lo.float() + hi.float()) / 2))


def tolerance(
    centre: torch.Tensor,
    sizes: torch.Tensor,
    alpha: float,
    k: int,
    dtype: torch.dtype,
    roundings: int = 1,
) -> torch.Tensor:
    """How far alpha times a float32 sum may be from alpha * centre, after rounding to `dtype`.

    centre, sizes: float64 sums of a*b and |a||b|. The formula is in `expect`.
    """
    g, g53 = (k * eps / (1 - k * eps) for eps in (_EPS32, _EPS64))
    inner = abs(alpha) * (g * sizes + 2 * _EPS32 * (centre.abs() + g * sizes) + g53 * sizes)
    u = (1 + UNIT_ROUNDOFF[dtype]) ** roundings - 1
    return u * (abs(alpha) * centre.abs() + inner) + inner + SMALLEST_SUBNORMAL[dtype] / 2


def _inward(x: torch.Tensor, dtype: torch.dtype, up: bool) -> torch.Tensor:
    """A bound rounded inwards; infinity is let in where the bound itself rounds to infinity."""
    if up:
        infinite = x <= -OVERFLOW[dtype]
        return torch.where(infinite, -float("inf"), round_up(x, dtype))
    return torch.where(x >= OVERFLOW[dtype], float("inf"), round_down(x, dtype))


def right(out: torch.Tensor, expected: Expectation) -> torch.Tensor:
    """bool (m, n): which elements of an output are right."""
    return (out >= expected.lo) & (out <= expected.hi)


@contextmanager
def without_tensor_cores() -> Iterator[None]:
    """float32 products in full while it lasts, whatever a backend has set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def grade(equal_by_width: Mapping[int, bool]) -> int | None:
    """A backend's width: the largest measured one that it, and every smaller one, got bit-exact.

    Exactness at a width implies it at every smaller one, so a gap below is a fault, not a grade.
    None means wrong. Raises ValueError where nothing was measured, or a width is not in `WIDTHS`.
    """
    if not equal_by_width or not set(equal_by_width) <= set(WIDTHS):
        raise ValueError(f"grading takes results at widths among {', '.join(map(str, WIDTHS))}")
    found = None
    for width in sorted(equal_by_width):
        if not equal_by_width[width]:
            break
        found = width
    return found
