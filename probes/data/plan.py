"""Planning an exact problem: which magnitudes and densities fill an accumulator of w bits.

Operand values are integers times a unit. A *style* says which integers; `plan` picks styles for
both operands, and densities, so that the largest ``sum |a||b|`` lands just below ``2**w`` units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import log2, sqrt

from ..problem import FORMATS, Problem

CODE_UNITS = (1, 2, 3, 4, 6, 8, 12)
"""Magnitudes of the non-zero e2m1 codes, in halves."""
MAX_BINADES = 11
"""Block scales from 2**-6 to 2**5 at most: e4m3's normal range, with room above."""
_TARGET = 0.85
_DEVIATIONS = 4.5
"""How far the largest of some million sums lies above their mean, in standard deviations."""
_DENSITY = (0.08, 0.95)
"""Wanted share of non-zero weights: below, a dropped block shows in few outputs."""


@dataclass(frozen=True, slots=True)
class Style:
    """How the values of one operand are made, with moments in units (of non-zero elements).

    kind       ``integers``: `bottom` to `top`, 16-bit floats. ``ones``: every value is 1, made of
               four different block scales and the code that undoes each. ``codes``: every e2m1 code
    binades    block scales span this many more binades than one (``codes``)
    mantissas  whether block scales use all eight e4m3 mantissas (``codes``)
    """

    kind: str
    top: int = 1
    bottom: int = 1
    binades: int = 0
    mantissas: bool = False

    @property
    def largest(self) -> float:
        """The largest magnitude, in units."""
        if self.kind != "codes":
            return float(self.top)
        return CODE_UNITS[-1] * 2.0**self.binades * (15 if self.mantissas else 1)

    @property
    def richness(self) -> float:
        """How much of the format it exercises, 0 to 1 and a little more."""
        if self.kind == "integers":
            return log2(self.top + 1) / 8
        if self.kind == "ones":
            return 0.3
        return 0.6 + 0.13 * min(self.binades, 3) - 0.02 * max(0, self.binades - 4)


@lru_cache(maxsize=256)
def _moments(style: Style) -> tuple[float, float, float, float]:
    """Mean and mean square of elements without their block scale, and of the block scales."""
    if style.kind == "integers":
        values = range(style.bottom, style.top + 1)
        return sum(values) / len(values), sum(v * v for v in values) / len(values), 1.0, 1.0
    if style.kind == "ones":
        return 1.0, 1.0, 1.0, 1.0
    steps = range(8, 16) if style.mantissas else range(1, 2)
    scales = [2.0**e * step for e in range(style.binades + 1) for step in steps]
    return (
        sum(CODE_UNITS) / 7,
        sum(c * c for c in CODE_UNITS) / 7,
        sum(scales) / len(scales),
        sum(s * s for s in scales) / len(scales),
    )


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """Styles of both operands; one activation in `stride` is non-zero, weights with `density`."""

    a: Style
    b: Style
    stride: int
    density: float


def _fp4_styles(scale: str) -> list[Style]:
    styles = [Style("ones")] + [Style("codes", binades=j) for j in range(1, MAX_BINADES + 1)]
    if scale == "e4m3":
        styles += [Style("codes", binades=j, mantissas=True) for j in range(MAX_BINADES + 1)]
    return styles


def _density(k: int, a: Style, b: Style, stride: int, block: int, budget: float) -> float:
    """The share of non-zero weights for which the largest sum is expected at the budget."""
    (ea, qa, sa, ta), (eb, qb, sb, tb) = _moments(a), _moments(b)
    dense = k / stride * ea * eb * sa * sb
    spread = ta * tb / (sa * sb) ** 2 - 1
    density = budget / dense
    for _ in range(4):
        share = min(density, 1.0)
        cv2 = stride / (k * share) * qa * qb * ta * tb / (ea * eb * sa * sb) ** 2
        cv2 += spread * block / k
        density = budget / dense / (1 + _DEVIATIONS * sqrt(cv2))
    return density


def plan_exact(problem: Problem, width: int, seed: int, boost: float = 1.0) -> ExactPlan:
    """The plan for one exact problem; the seed alternates which operand gets the richer values.

    Among all styles and strides whose density is in a useful range the richest wins; with none in
    range (very small or very large k), the nearest. `boost` asks for larger sums than the estimate
    says, for problems too small for the estimate to hold. Nothing is promised: `exact` measures.
    """
    return _best_plan(problem.format, problem.activation, problem.k, width, seed & 3, boost)


@lru_cache(maxsize=1024)
def _best_plan(
    format: str, activation: str, k: int, width: int, flavour: int, boost: float
) -> ExactPlan:
    fmt = FORMATS[format]
    budget = boost * _TARGET * 2.0**width
    styles_b = _fp4_styles(fmt.scale)
    tops = (255,) if width >= 18 else (255, 127, 63, 31, 15, 7, 3, 1)
    styles_a = styles_b if activation == "fp4" else [Style("integers", top=t) for t in tops]
    rich_a, rich_b = ((1.0, 2.0), (2.0, 1.0))[flavour & 1]
    mantissas = bool(flavour & 2)
    best: tuple[tuple[float, float], ExactPlan] | None = None
    for a, b, stride in product(styles_a, styles_b, (1, 2, 4, 8, 16)):
        if a.kind == "integers" and stride > 2:
            # Few to a block: none so small that dropping the block drowns in the output's rounding.
            a = replace(a, bottom=a.top // 4 + 1)
        density = _density(k, a, b, stride, fmt.block, budget)
        low, high = _DENSITY
        miss = max(0.0, log2(low / density), log2(density / high))
        miss += max(0.0, log2(2 * a.largest * b.largest) - width)
        score = rich_a * a.richness + rich_b * b.richness
        score += 0.3 * (b.mantissas == mantissas) - 0.15 * log2(stride)
        score += 0.1 * log2(min(density, 1.0))
        key = (-miss, score)
        if best is None or key > best[0]:
            best = key, ExactPlan(a, b, stride, min(density, 1.0))
    assert best is not None
    return best[1]
