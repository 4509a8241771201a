"""The statistics of verdicts and times: medians, means, and rates of failure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, comb, expm1, inf, log1p, sqrt
from statistics import fmean, median, stdev

__all__ = [
    "DEFAULT_CONFIDENCE",
    "confident",
    "failure_bound",
    "interval",
    "mean_interval",
    "median",
    "median_interval",
    "needed",
    "t_quantile",
    "upper",
]

DEFAULT_CONFIDENCE = 0.95


def confident(confidence: float) -> float:
    """`confidence`, checked to be in (0, 1). Raises ValueError."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence:g} is not between 0 and 1")
    return confidence


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """A distribution-free interval for the median: order statistics with binomial ranks.

    The widest interval there is where the samples are too few for `confidence`.
    """
    ordered = sorted(samples)
    size = len(ordered)
    low = 0
    tail = 0.0
    for rank in range(size // 2):
        tail += comb(size, rank) * 0.5**size
        if 2 * tail > 1 - confidence:
            break
        low = rank + 1
    low = max(low - 1, 0)
    return ordered[low], ordered[size - 1 - low]


def mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """A two-sided interval of the mean: ``mean +- t * s / sqrt(n)`` with n - 1 degrees of freedom
    (Student, Biometrika 6, 1908). An outlier widens it, so it errs towards measuring on.

    Unbounded for one value. Raises ValueError for none, and for a confidence outside (0, 1).
    """
    if not values:
        raise ValueError("no values have no mean")
    confident(confidence)
    middle, count = fmean(values), len(values)
    if count == 1:
        return -inf, inf
    half = t_quantile((1 + confidence) / 2, count - 1) * stdev(values) / sqrt(count)
    return middle - half, middle + half


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: int) -> float:
    """The t that Student's distribution of `freedom` degrees stays below with `probability`."""
    from scipy.special import stdtrit  # a second, which who only reads what is stored does not pay

    return float(stdtrit(freedom, probability))


def upper(failures: int, trials: int, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """The one-sided upper Clopper-Pearson bound of a rate: the largest p that is not refuted.

    The p at which `failures` or fewer in `trials` have probability ``1 - confidence``:
    ``1 - (1 - confidence)**(1 / trials)`` without a failure, else the `confidence` quantile of
    Beta(failures + 1, trials - failures). 1 without a trial. (Clopper and Pearson, Biometrika 26,
    1934.) Raises ValueError for counts that cannot be.
    """
    if not 0 <= failures <= trials:
        raise ValueError(f"{failures} failures in {trials} trials cannot be")
    confident(confidence)
    if failures == trials:
        return 1.0
    if failures == 0:
        return -expm1(log1p(-confidence) / trials)
    from scipy.special import betaincinv  # a second, too

    return float(betaincinv(failures + 1, trials - failures, confidence))


def interval(
    failures: int, trials: int, confidence: float = DEFAULT_CONFIDENCE
) -> tuple[float, float]:
    """The two-sided Clopper-Pearson interval of a rate, with half the doubt on either side."""
    half = (1 + confident(confidence)) / 2
    high = upper(failures, trials, half)
    low = 1 - upper(trials - failures, trials, half) if failures else 0.0
    return low, high


def failure_bound(launches: int, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """The upper bound of a failure rate after `launches` independent ones without a failure."""
    return upper(0, max(0, launches), confidence)


def needed(rate: float, confidence: float = DEFAULT_CONFIDENCE) -> int:
    """The fewest trials without a failure whose upper bound is at most `rate`."""
    trials = max(1, ceil(log1p(-confidence) / log1p(-rate)))
    while upper(0, trials, confidence) > rate:
        trials += 1
    return trials
