"""Exact problems: operands whose product is the same in any order of summation, to the last bit.

Every value is an integer multiple of a unit, so every partial sum is one; and the largest
``sum |a||b|`` over the outputs is at most ``2**width`` units. An accumulator with `width`
significand bits therefore never rounds, and the output must be the correctly rounded one, bit for
bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import dequantise, pack
from ..problem import FORMATS, Format, Fp4Tensor, Problem
from .generator import Drawn, below, fill_rows, hash_elements, hash_rows, mix, stream_key
from .operands import Operands
from .plan import MAX_BINADES, ExactPlan, Style, plan_exact

WIDTHS = (24, 18, 14, 11, 8)
"""The accumulator widths that are graded, in bits, widest first."""

_BOOSTS = (1.0, 1.0, 2.0, 0.5, 4.0, 0.25, 8.0, 0.125)
"""Tried in turn: problems of a few elements may lie far from the plan's estimate."""
_STEADY_BOOSTS = (0.5, 0.25, 1.0, 0.125, 0.0625, 2.0, 4.0, 8.0)
"""The same where the largest sum of *any* rows is to fit: it is some times that of those drawn."""
_STEPS = 12
_POSITIVE = 4
"""One row in this many has no negative value: some sums then really reach ``sum |a||b|``."""
_UNIT_RANGE = (-14, 15)
"""Outputs are multiples of 2**-14 and at most 2**15: normal numbers in fp16 as in bf16."""
_MAX_UNIT = 4


@dataclass(frozen=True, slots=True)
class _Mask:
    """Which elements are non-zero: one at random in each `stride` along k; or each with probability
    `share`/65536, and at least one in any `cover` consecutive rows of each column.
    """

    stride: int = 0
    share: int = 0
    cover: int = 1

    def __call__(self, bits: torch.Tensor, first: int, key: int) -> torch.Tensor:
        rows, cols = bits.shape
        k = torch.arange(cols, dtype=torch.int32, device=bits.device)
        if self.stride:
            groups = hash_elements(
                rows, -(-cols // self.stride), mix(key + 1), bits.device, first
            ) & (self.stride - 1)
            return groups.repeat_interleave(self.stride, dim=1)[:, :cols] == k % self.stride
        row = torch.arange(first, first + rows, dtype=torch.int32, device=bits.device)
        offset = hash_rows(cols, mix(key + 2), bits.device) & (self.cover - 1)
        forced = (row.unsqueeze(1) & (self.cover - 1)) == offset
        return ((bits & 0xFFFF) < self.share) | forced


def _negative(bits: torch.Tensor, first: int, key: int) -> torch.Tensor:
    """Signs (bool): random, except in the rows that are all positive."""
    rows = hash_rows(bits.shape[0], mix(key + 3), bits.device, first)
    return (bits < 0) & ((rows & (_POSITIVE - 1)) != 0).unsqueeze(1)


def _base(style: Style) -> int:
    """Exponent of the smallest block scale."""
    if style.kind == "ones":
        return -2
    return max(-6, -(style.binades // 2) - 1) if style.binades < MAX_BINADES else -6


def _unit_exponent(style: Style) -> int:
    """log2 of the unit of an FP4 operand's values, without global scale or shift."""
    return 0 if style.kind == "ones" else _base(style) - 1 - 3 * style.mantissas


def _fp4_operand(
    drawn: Drawn, fmt: Format, style: Style, mask: _Mask, shift: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, k/2) and raw scales (rows, k/block); `shift` is added to scale exponents."""
    rows, k, device = drawn.rows, drawn.k, drawn.device
    packed = torch.empty(rows, k // 2, dtype=torch.uint8, device=device)
    raw = torch.empty(rows, k // fmt.block, dtype=torch.uint8, device=device)
    return _fill_fp4((packed, raw), drawn, fmt, style, mask, shift)


def _fill_fp4(
    parts: tuple[torch.Tensor, torch.Tensor],
    drawn: Drawn,
    fmt: Format,
    style: Style,
    mask: _Mask,
    shift: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_fp4_operand` into the codes and raw scales that are there."""
    packed, raw = parts
    k, key, device = drawn.k, drawn.key, drawn.device
    span = 4 if style.kind == "ones" else style.binades + 1

    def blocks(first: int, count: int) -> torch.Tensor:
        return hash_elements(count, k // fmt.block, mix(key + 4), device, first)

    def scales(first: int, count: int) -> torch.Tensor:
        bits = blocks(first, count)
        exponent = below(bits, 0, 16, span) + _base(style) + shift
        if fmt.scale == "e8m0":
            return (exponent + 127).to(torch.uint8)
        mantissa = below(bits, 16, 12, 8) if style.mantissas else torch.zeros_like(exponent)
        return (((exponent + 7) << 3) | mantissa).to(torch.uint8)

    def codes(first: int, count: int) -> torch.Tensor:
        bits = hash_elements(count, k, key, device, first)
        if style.kind == "ones":
            index = below(blocks(first, count), 0, 16, span)
            # A scale of 2**s needs the code of 2**-s to make a one: 6, 4, 2 or 1 for 4, 2, 1 or a
            # half. Worked out, since a table would have to be copied to the device.
            inverse = (6 - 2 * index).clamp_(min=1).to(torch.uint8)
            size = inverse.repeat_interleave(fmt.block, dim=1)
        else:
            size = (below(bits, 16, 15, 7) + 1).to(torch.uint8)
        size = size * mask(bits, first, key).to(torch.uint8)
        return pack(size | (_negative(bits, first, key).to(torch.uint8) << 3))

    return fill_rows(packed, codes, k), fill_rows(raw, scales, k // fmt.block)


def _fill_integers(
    out: torch.Tensor, drawn: Drawn, style: Style, mask: _Mask, exponent: int
) -> torch.Tensor:
    """`out` (rows, k) filled with the style's integers times 2**exponent under the mask."""
    k, key, device = drawn.k, drawn.key, drawn.device

    def draw(first: int, count: int) -> torch.Tensor:
        bits = hash_elements(count, k, key, device, first)
        size = below(bits, 16, 15, style.top + 1 - style.bottom) + style.bottom
        size = size * mask(bits, first, key)
        value = torch.where(_negative(bits, first, key), -size, size)
        return (value.float() * 2.0**exponent).to(out.dtype)

    return fill_rows(out, draw, k)


@dataclass(frozen=True, slots=True)
class Rows:
    """How rows of an activation are drawn, as often as wanted: those of each draw are others.

    Rows of any draw, times the weight they were made for, are exact problems of its width. A row
    does not depend on how many there are.
    """

    format: Format
    style: Style
    stride: int
    exponent: int
    """log2 of the unit of 16-bit rows."""
    key: int

    def fill(self, a: torch.Tensor | Fp4Tensor, draw: int) -> None:
        """Put the rows of a draw where those of `a` (m, k) are; enqueues only."""
        rows, k = a.shape
        key = self.key if draw == 0 else mix(self.key ^ mix(draw + 0x5EED))
        mask = _Mask(stride=self.stride)
        if isinstance(a, Fp4Tensor):
            drawn = Drawn(rows, k, key, a.codes.device)
            _fill_fp4((a.codes, a.scales), drawn, self.format, self.style, mask)
        else:
            drawn = Drawn(rows, k, key, a.device)
            _fill_integers(a, drawn, self.style, mask, self.exponent)

    def most(self, weight: Fp4Tensor) -> float:
        """The largest ``sum |a||b|`` that rows of any draw can come to with `weight`, without
        global scales: in each stride along k at most one element is not zero."""
        unit = self.exponent if self.style.kind == "integers" else _unit_exponent(self.style)
        n, k = weight.shape
        best = torch.zeros((), dtype=torch.float64, device=weight.codes.device)
        for first in range(0, n, _MOST_ROWS):
            part = weight_rows(weight, slice(first, first + _MOST_ROWS))
            sizes = dequantise(part, torch.float32, False).abs_()
            sizes = torch.nn.functional.pad(sizes, (0, -k % self.stride))
            largest = sizes.view(len(sizes), -1, self.stride).amax(2)
            best = torch.maximum(best, largest.double().sum(1).max())
        return float(best) * self.style.largest * 2.0**unit


def _scalar(exponent: int, device: torch.device | str) -> torch.Tensor:
    return torch.full((), 2.0**exponent, dtype=torch.float32, device=device)


_MOST_ROWS = 8192


def weight_rows(weight: Fp4Tensor, rows: slice | torch.Tensor) -> Fp4Tensor:
    """Some rows of a weight, which are columns of the output."""
    return Fp4Tensor(weight.format, weight.codes[rows], weight.scales[rows], weight.global_scale)


def largest_sum(a: torch.Tensor | Fp4Tensor, weight: Fp4Tensor, chunk: int = 2048) -> float:
    """max over outputs of ``sum_k |a||b|`` without global scales, in fp64, by `chunk` columns."""
    left = (dequantise(a, torch.float64, False) if isinstance(a, Fp4Tensor) else a.double()).abs()
    n = weight.codes.shape[0]
    best = left.new_zeros(())
    for first in range(0, n, chunk):
        part = weight_rows(weight, slice(first, first + chunk))
        right = dequantise(part, torch.float64, False).abs_()
        best = torch.maximum(best, (left @ right.T).max())
    return float(best)


def exact(problem: Problem, width: int, seed: int, device: torch.device | str) -> Operands:
    """Operands of an exact problem of `width` bits, the same bits on every device.

    Guaranteed, because measured: the largest ``sum |a||b|`` over the outputs is in
    ``(2**(width-1), 2**width]`` units. Any window of activation rows is exact, too. alpha is a
    power of two; outputs are multiples of 2**-14 and at most 2**15, so bf16 and fp16 hold them
    without overflow or subnormals. Each row of the activation has a non-zero in every 16 along k,
    each k a non-zero weight in any few consecutive rows; a quarter of the rows are all positive.

    `seed` also picks block scales (powers of two, or all mantissas), and which operand is richer.
    Raises ValueError for a width not in `WIDTHS`, for groups, and for a shape too small for it.
    """
    return _drawn(problem, width, seed, device, steady=False)


def steady(problem: Problem, width: int, seed: int, device: torch.device | str) -> Operands:
    """As `exact`, with rows that can be drawn anew any number of times: `Operands.rows`.

    What is in ``(2**(width-1), 2**width]`` units is the largest ``sum |a||b|`` that any rows drawn
    so *can* come to with the weight. So each draw is exact, and none needs to be measured; the sums
    of one draw are about half as large, or less.
    """
    return _drawn(problem, width, seed, device, steady=True)


def _drawn(
    problem: Problem, width: int, seed: int, device: torch.device | str, steady: bool
) -> Operands:
    if width not in WIDTHS:
        raise ValueError(f"width {width} is not one of {', '.join(map(str, WIDTHS))}")
    if problem.groups != 1:
        raise ValueError("exact problems are drawn for one group")
    stream = "steady" if steady else "exact"
    for attempt, boost in enumerate(_STEADY_BOOSTS if steady else _BOOSTS):
        key = stream_key(seed, f"{stream}/{width}/{attempt}")
        chosen = plan_exact(problem, width, seed, boost)
        rows = _rows(problem, chosen, key)
        a = _activation(problem, rows, key, device)
        found = _fitting(problem, width, chosen, _Left(a, rows, key, steady))
        if found:
            return Operands(
                _first_rows(found[0], problem.m),
                found[1],
                family="exact",
                width=width,
                seed=seed,
                rows=rows if steady else None,
            )
    raise ValueError(
        f"no exact problem of {width} bits with m={problem.m}, n={problem.n}, k={problem.k}"
    )


@dataclass(frozen=True, slots=True)
class _Left:
    """An activation without its global scale, and how large its sums are to be."""

    a: torch.Tensor | Fp4Tensor
    rows: Rows
    key: int
    steady: bool

    def largest(self, weight: Fp4Tensor) -> float:
        return self.rows.most(weight) if self.steady else largest_sum(self.a, weight)


def _rows(problem: Problem, chosen: ExactPlan, key: int) -> Rows:
    exponent = 0 if problem.activation == "fp4" else -(mix(key + 11) & 1)
    return Rows(FORMATS[problem.format], chosen.a, chosen.stride, exponent, mix(key + 20))


def _activation(
    problem: Problem, rows: Rows, key: int, device: torch.device | str
) -> torch.Tensor | Fp4Tensor:
    """Draw 0 of the rows, at least one; a global scale is put in when the weight is known."""
    m = max(1, problem.m)
    a: torch.Tensor | Fp4Tensor
    if problem.activation == "fp4":
        fmt = rows.format
        codes = torch.empty(m, problem.k // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(m, problem.k // fmt.block, dtype=torch.uint8, device=device)
        a = Fp4Tensor(fmt, codes, scales, _scalar(0, device))
    else:
        a = torch.empty(m, problem.k, dtype=problem.dtype, device=device)
    rows.fill(a, 0)
    return a


def _fitting(
    problem: Problem, width: int, chosen: ExactPlan, left: _Left
) -> tuple[torch.Tensor | Fp4Tensor, Fp4Tensor] | None:
    """The activation, and a weight by a plan whose density is adjusted until the largest sum fits;
    or None."""
    fmt, key = FORMATS[problem.format], left.key
    w4a4 = problem.activation == "fp4"
    unit_a = _unit_exponent(chosen.a) if w4a4 else left.rows.exponent
    unit = unit_a + _unit_exponent(chosen.b)
    low, high = _UNIT_RANGE[0], min(_UNIT_RANGE[1] - width, _MAX_UNIT)
    alpha = low + mix(key + 12) % (high - low + 1) - unit
    # MXFP4 has no global scale: what would be alpha moves into the weight's block scales.
    shift, alpha = (0, alpha) if fmt.has_global else (alpha, 0)
    global_a = alpha // 2 if w4a4 else 0
    device = left.a.codes.device if isinstance(left.a, Fp4Tensor) else left.a.device
    right = Drawn(problem.n, problem.k, mix(key + 21), device)
    a = left.a
    if isinstance(a, Fp4Tensor):
        a = Fp4Tensor(fmt, a.codes, a.scales, _scalar(global_a, device))

    cover = 16
    while cover * chosen.density < 2 and cover < 1 << 15:
        cover *= 2
    limit = 2.0 ** (width + unit + shift)
    share, known_low, known_high = chosen.density, 0.0, 1.0
    for _ in range(_STEPS):
        mask = _Mask(share=round(65536 * max(0.0, share - 1 / cover)), cover=cover)
        made = _fp4_operand(right, fmt, chosen.b, mask, shift)
        weight = Fp4Tensor(fmt, *made, _scalar(alpha - global_a, device))
        found = left.largest(weight)
        if limit / 2 < found <= limit:
            return a, weight
        if (found <= limit and share >= 1) or known_high - known_low < 2.0**-16:
            return None
        # Larger shares keep every element of smaller ones: the sum is monotone in the share.
        known_low, known_high = (share, known_high) if found <= limit else (known_low, share)
        share = min(1.0, share * 0.8 * limit / found) if found else 1.0
        if not known_low < share <= known_high:
            share = (known_low + known_high) / 2
    return None


def _first_rows(a: torch.Tensor | Fp4Tensor, m: int) -> torch.Tensor | Fp4Tensor:
    if isinstance(a, Fp4Tensor):
        return Fp4Tensor(a.format, a.codes[:m], a.scales[:m], a.global_scale)
    return a[:m]
