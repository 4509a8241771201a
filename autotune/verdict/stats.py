"""The few statistics that timings and launch counts need."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median

__all__ = ["failure_bound", "median", "median_interval"]


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


def failure_bound(launches: int, confidence: float = 0.95) -> float:
    """Upper bound of the failure rate after `launches` independent ones without a failure.

    ``1 - (1 - confidence) ** (1 / launches)``, about 3 / launches at 95 %; 1 for none.
    """
    return 1.0 if launches < 1 else 1.0 - (1.0 - confidence) ** (1.0 / launches)
