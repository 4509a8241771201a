"""GPUs slower than their like, by medians: robust against the outliers that are looked for.

Within a cell (cohort, tactic, bucket) a GPU's log time is compared with the cell's median. The
median of a GPU's differences over its cells of one cohort is its *slowness* d there, which one odd
bucket does not move. Over the GPUs of a cohort d is scaled by 1.4826 times the median absolute
deviation (1.4826 makes that the standard deviation of a normal distribution; Rousseeuw and Croux,
JASA 88, 1993), and z = d / scale is compared with the normal quantile of ``1 - ALPHA / tests``,
over all tests of a report (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from statistics import NormalDist, median

ALPHA = 0.01
"""Chance that a report on a fleet without slow GPUs names any."""
LEAST_GPUS = 8
"""GPUs in a cohort below which nobody is told slow."""
LEAST_EFFECT = 0.03
"""Slower than the median by less than 3 % is not worth a word: choices call 2 % a tie."""
_LEAST_SCALE = 0.003
"""Of log time: timers and rounding alone make as much."""


@dataclass(frozen=True, slots=True)
class SlowGpu:
    """One GPU in one cohort. `factor` is its time over the cohort's median."""

    cohort: str
    device: str
    node: str
    factor: float
    z: float
    buckets: int


def outliers(
    slowness: Mapping[str, Sequence[tuple[str, str, float, int]]], alpha: float = ALPHA
) -> list[SlowGpu]:
    """The slow ones; `slowness` is cohort -> (device, node, d, buckets) of each GPU."""
    cohorts = {name: rows for name, rows in slowness.items() if len(rows) >= LEAST_GPUS}
    tests = sum(len(rows) for rows in cohorts.values())
    if not tests:
        return []
    limit = NormalDist().inv_cdf(1 - alpha / tests)
    return sorted(
        (slow for name, rows in cohorts.items() for slow in _slow_of_cohort(name, rows, limit)),
        key=lambda slow: (-slow.factor, slow.device),
    )


def _slow_of_cohort(
    cohort: str, rows: Iterable[tuple[str, str, float, int]], limit: float
) -> Iterable[SlowGpu]:
    rows = list(rows)
    centre = median(d for _, _, d, _ in rows)
    scale = max(_LEAST_SCALE, 1.4826 * median(abs(d - centre) for _, _, d, _ in rows))
    for device, node, d, buckets in rows:
        z, factor = (d - centre) / scale, exp(d - centre)
        if z > limit and factor >= 1 + LEAST_EFFECT:
            yield SlowGpu(cohort, device, node, round(factor, 4), round(z, 1), buckets)
