"""Student's t, for means of a few measurements."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import inf, sqrt
from statistics import fmean, stdev

from .bounds import incomplete_beta

_STEPS = 200


def mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """A two-sided interval of the mean: ``mean +- t * s / sqrt(n)`` with n - 1 degrees of freedom
    (Student, Biometrika 6, 1908). An outlier widens it, so it errs towards measuring on.

    Unbounded for one value. Raises ValueError for none, and for a confidence outside (0, 1).
    """
    if not values:
        raise ValueError("no values have no mean")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence:g} is not between 0 and 1")
    middle, count = fmean(values), len(values)
    if count == 1:
        return -inf, inf
    half = t_quantile((1 + confidence) / 2, count - 1) * stdev(values) / sqrt(count)
    return middle - half, middle + half


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: int) -> float:
    """The t that Student's distribution stays below with `probability`, from 0.5 up to 1.

    From ``P(|T| > t) = I_x(freedom / 2, 1 / 2)`` with ``x = freedom / (freedom + t^2)`` (NIST
    Handbook of Mathematical Functions, 26.7.1), solved for x by bisection.
    """
    tail = 2 * (1 - probability)
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if incomplete_beta(middle, freedom / 2, 0.5) < tail:
            low = middle
        else:
            high = middle
    return sqrt(freedom * (1 - low) / low) if low > 0 else inf
