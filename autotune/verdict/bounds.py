"""How sure: Clopper-Pearson bounds of failure rates, one for each (compiled kernel, regime).

A bound holds for the launches a regime makes, on problems drawn as that regime draws them, and
says nothing about another regime: so bounds are never summed over regimes. Its trials are different
problems and not launches, since repeats of one problem are one trial for a fault that depends on
the data alone. All buckets that one compiled kernel serves are pooled: whatever it is, it is the
same machine code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, exp, expm1, inf, lgamma, log, log1p, log10
from typing import Any

from ...cache.rows import BucketKey, Evidence
from ...probes.regimes import REGIMES

EXACT = "exact"
"""The data name of exact problems, in every regime."""
DEFAULT_CONFIDENCE = 0.95
_STEPS = 200
_TINY = 1e-300

Kernel = tuple[str, ...]
"""Backend, tactic, format, activation, output dtype, and the code digest where one is known."""


@dataclass(frozen=True, slots=True)
class Aim:
    """A failure rate to bound, at a confidence; both in (0, 1). Raises ValueError."""

    rate: float
    confidence: float = DEFAULT_CONFIDENCE

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"a failure rate of {self.rate:g} is not between 0 and 1")
        confident(self.confidence)

    @property
    def problems(self) -> int:
        """Different problems without a failure that bound the rate by this much."""
        return needed(self.rate, self.confidence)


@dataclass(frozen=True, slots=True)
class Bound:
    """What one regime showed of one compiled kernel, over all buckets that it serves.

    `launches` were checked on `problems` different problems, of which `failures` went wrong; at
    `confidence` the rate of failing problems, in this regime, is at most `upper`.
    """

    regime: str
    launches: int
    problems: int
    failures: int
    upper: float
    confidence: float

    def json(self) -> dict[str, Any]:
        """As it is stored under its regime; `upper` to six digits, rounded up."""
        digits = 6 - ceil(log10(self.upper)) if self.upper > 0 else 0
        rounded = min(1.0, round(self.upper + 0.5 * 10.0**-digits, digits))
        values = {name: getattr(self, name) for name in ("launches", "problems", "failures")}
        return {**values, "upper": rounded, "confidence": self.confidence}


def confident(confidence: float) -> float:
    """`confidence`, checked to be in (0, 1). Raises ValueError."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence:g} is not between 0 and 1")
    return confidence


def upper(failures: int, trials: int, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """One-sided upper Clopper-Pearson bound of a rate: the largest p that is not refuted.

    The p at which `failures` or fewer in `trials` have probability ``1 - confidence``:
    ``1 - (1 - confidence)**(1 / trials)`` without a failure, else the `confidence` quantile of
    Beta(failures + 1, trials - failures). 1 without a trial. (Clopper and Pearson, Biometrika 26,
    1934.) Raises ValueError for counts that cannot be.
    """
    _check(failures, trials)
    confident(confidence)
    if failures == trials:
        return 1.0
    if failures == 0:
        return -expm1(log1p(-confidence) / trials)
    return _beta_quantile(confidence, failures + 1, trials - failures)


def interval(
    failures: int, trials: int, confidence: float = DEFAULT_CONFIDENCE
) -> tuple[float, float]:
    """The two-sided Clopper-Pearson interval of a rate, with half the doubt on either side."""
    half = (1 + confident(confidence)) / 2
    high = upper(failures, trials, half)
    low = 1 - upper(trials - failures, trials, half) if failures else 0.0
    return low, high


def needed(rate: float, confidence: float = DEFAULT_CONFIDENCE) -> int:
    """Fewest trials without a failure whose upper bound is at most `rate`."""
    trials = max(1, ceil(log1p(-confidence) / log1p(-rate)))
    while upper(0, trials, confidence) > rate:
        trials += 1
    return trials


def _check(failures: int, trials: int) -> None:
    if not 0 <= failures <= trials:
        raise ValueError(f"{failures} failures in {trials} trials cannot be")


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for a, b > 0 and x in [0, 1].

    By the continued fraction 8.17.22 of the NIST Digital Library of Mathematical Functions,
    evaluated by Lentz's method, on the side where it converges fast.
    """
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(1 - x, b, a)
    front = exp(a * log(x) + b * log1p(-x) + lgamma(a + b) - lgamma(a) - lgamma(b))
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > _TINY else _TINY)
    fraction = d
    for m in range(1, 10_000):
        step = 0.0
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c = 1.0 + numerator / c
            d = 1.0 + numerator * d
            c, d = (v if abs(v) > _TINY else _TINY for v in (c, d))
            d = 1.0 / d
            step = c * d
            fraction *= step
        if abs(step - 1.0) < 1e-15:
            break
    return front * fraction / a


def _beta_quantile(probability: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = probability, by bisection; the upper end, so never too small."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if incomplete_beta(middle, a, b) < probability:
            low = middle
        else:
            high = middle
    return high


def codes(rows: Iterable[Evidence]) -> dict[tuple[str, str, BucketKey], str]:
    """(backend, tactic, bucket) -> digest of the machine code that ran there.

    From evidence whose ``detail["code"]`` says so; where different digests ran, all of them.
    """
    found: dict[tuple[str, str, BucketKey], dict[str, None]] = {}
    for row in rows:
        if row.detail.get("code"):
            place = row.backend, row.tactic, row.bucket
            found.setdefault(place, {})[str(row.detail["code"])] = None
    return {place: " ".join(sorted(digests)) for place, digests in found.items()}


def kernel(
    backend: str,
    tactic: str,
    bucket: BucketKey,
    known: Mapping[tuple[str, str, BucketKey], str],
) -> Kernel:
    """The compiled kernel that serves a bucket, as far as it is known.

    Its code digest tells kernels apart where there is one (`codes`); else the backend and the
    tactic do, with what no kernel is shared across: format and dtypes.
    """
    parts = (backend, tactic, bucket.format, bucket.activation, bucket.out_dtype)
    code = known.get((backend, tactic, bucket))
    return (*parts, code) if code else parts


def pool(
    rows: Iterable[Evidence], confidence: float = DEFAULT_CONFIDENCE
) -> dict[Kernel, dict[str, Bound]]:
    """Kernel -> regime -> bound, from evidence on exact problems that passed or failed.

    A failure without a count (a crash, a hang, an error) is one failing problem.
    """
    rows = list(rows)
    known = codes(rows)
    counts: dict[Kernel, dict[str, list[int]]] = {}
    for row in rows:
        if row.data != EXACT or row.status not in ("passed", "failed"):
            continue
        if row.regime not in REGIMES:
            continue  # a census or an audit launches nothing to be checked
        launches, problems, failures = row.launches, row.problems, 0
        if row.status == "failed":
            failures = max(1, int(row.detail.get("bad_problems") or 0))
            launches, problems = max(launches, failures), max(problems, failures)
        if not problems:
            continue
        key = kernel(row.backend, row.tactic, row.bucket, known)
        found = counts.setdefault(key, {}).setdefault(row.regime, [0, 0, 0])
        for place, value in enumerate((launches, problems, failures)):
            found[place] += value
    return {
        key: {
            regime: Bound(regime, launches, problems, failures, bound, confidence)
            for regime, (launches, problems, failures) in regimes.items()
            for bound in (upper(failures, problems, confidence),)
        }
        for key, regimes in counts.items()
    }


def worst(bounds: Mapping[str, Bound]) -> float:
    """The largest bound of any regime; 1 where there is none."""
    return max((b.upper for b in bounds.values()), default=1.0)


def short(regime: str, bound: Bound | None, aim: Aim) -> str | None:
    """Why this regime did not reach the aim, in words; None where it did."""
    found = bound.upper if bound else inf
    if found <= aim.rate:
        return None
    said = f"{bound.upper:.1g} only" if bound and bound.upper < 1 else "nothing"
    return f"{regime}: failure rate bounded by {said}, {aim.rate:.1g} was asked for"
