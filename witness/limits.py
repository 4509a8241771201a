"""How far a row's sum may be from what it should be before it is a suspicion.

With ``y = round(alpha * a @ W.T)`` of a group of columns and random signs r that are drawn
independently of the data, ``d = r @ y - alpha * a @ (W.T @ r)`` is ``r @ e`` for the errors e of y,
and of what is summed here. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

T = 8.0
"""Standard deviations, in Hoeffding's inequality (Journal of the American Statistical Association
58, 1963, theorem 2): signs r that are independent of the errors make ``|r @ e| <= T * norm2(e)``
but for a chance of 2 * exp(-T^2/2), 2.5e-14."""
SAFETY = 4.0
"""How much more than the probe measured an accumulation may be off."""
UNMEASURED = 1.5e-2
"""The relative error of a right row where no probe measured it: what design calls a right tile."""
_PER_ROOT = 1.35e-2 / 64
UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""Largest relative error of rounding to nearest."""
SMALLEST_SUBNORMAL = {"bf16": 2.0**-133, "fp16": 2.0**-24}
LARGEST = {"bf16": (2 - 2.0**-7) * 2.0**127, "fp16": 65504.0}
FAR = 4.0
"""A sum is far from overflow where it is below the largest number over this: one element that may
overflow makes both vectors' sums larger than that, but where all the others happen to take three
quarters of it away again (of rows that overflow float16, one of some 50,000 on an H200).
Asked only where an output is not finite: a group's sum is often 32 times as large as its elements
are (1,024 columns), so that in float16 a NaN goes unjudged from elements of size 500 on, and finite
rows would from size 8 on."""
_DEEP = 160
_OWN = _DEEP * 2.0**-24
"""Rounding of the check's own float32 sums, relative to the sum of magnitudes: the kernel adds in
a tree, at most so many additions deep (see `deep_enough`), to what was rounded once."""
_OWN_Y = 24 * 2.0**-24 * 32
"""The same of r @ y relative to norm2(y): 24 additions deep, and norm1 <= 32 * norm2 of 1,024."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit of a suspicion: ``of_y * norm2(y) + of_sum * |alpha| * |a| @ |s| + floor``.

    overflow  |alpha * a @ s| from which an output that is not finite may be right
    """

    of_y: float
    of_sum: float
    floor: float
    overflow: float

    def at(self, norm: float, size: float) -> float:
        """The limit of one row in one group: `norm` is norm2(y), `size` |alpha| * |a| @ |s|."""
        return self.of_y * norm + self.of_sum * size + self.floor


def accumulation(measured: float | None, k: int) -> float:
    """What the sum over k may add to a row's relative error (norm2(e) over norm2(y)): four times
    what the probe `measured`, and never more than a right tile may have; that where it did not."""
    most = max(UNMEASURED, _PER_ROOT * sqrt(k))
    return most if measured is None else min(SAFETY * measured, most)


def limit(out_dtype: str, columns: int, k: int, measured: float | None = None) -> Limit:
    """The limit for groups of up to `columns` columns of an output of `out_dtype` (bf16, fp16).

    Rounding: ``T * u * norm2(y)``, and half the smallest subnormal a column; accumulation as
    `accumulation` has it; the check's own sums in the worst case. Raises KeyError, ValueError.
    """
    if columns < 1 or k < 1 or (measured is not None and not 0 <= measured < 1):
        raise ValueError(f"no limit for {columns} columns, k={k} and an accumulation of {measured}")
    rounding = T * UNIT_ROUNDOFF[out_dtype]
    floor = T * sqrt(columns) * SMALLEST_SUBNORMAL[out_dtype] / 2 + SMALLEST_SUBNORMAL[out_dtype]
    return Limit(
        rounding + accumulation(measured, k) + _OWN_Y,
        _OWN,
        floor,
        LARGEST[out_dtype] / FAR,
    )


def chance_of_a_false_alarm(t: float = T) -> float:
    """An upper bound of the chance that rounding alone passes ``t * norm2(e)``, in one group."""
    return 2 * exp(-t * t / 2)


def deep_enough(k: int, block: int) -> bool:
    """Whether sums over k in blocks of `block` (one sum a lane, of FP4 twice a block, then a tree)
    stay within what `limit` allows for."""
    return 2 * -(-k // block) + block.bit_length() + 2 <= _DEEP


def smallest_seen(out_dtype: str, width: int, k: int, measured: float | None = None) -> float:
    """The smallest error that is always a suspicion, in standard deviations of y: an error of one
    column in a group of `width` whose y have standard deviation 1. A wrong block of c columns with
    independent errors of size x is seen with about the chance of ``|N(0, c) * x| > that``, twice.
    """
    found = limit(out_dtype, width, k, measured)
    # 5: the rounding of the other columns, against what is wrong, hardly ever is more than that.
    return found.of_y * sqrt(width) + 5 * UNIT_ROUNDOFF[out_dtype] / sqrt(3) * sqrt(width)
