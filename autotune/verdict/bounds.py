"""How sure: Clopper-Pearson bounds of failure rates, one for each (compiled kernel, regime).

A bound holds for the launches a regime makes, on problems drawn as that regime draws them, and
says nothing about another regime: so bounds are never summed over regimes. Its trials are checked
launches: they bound faults that wait for chance. For a fault of the data repeats of one problem are
one trial, so different problems are counted beside them, and an aim wants one for every hundred
launches. All buckets that one compiled kernel serves are pooled: whatever it is, it is the
same machine code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, inf, log10
from typing import Any

from ...cache.rows import Evidence, Where
from ...words import EXACT, UNCHECKED
from .statistics import DEFAULT_CONFIDENCE, confident, needed, upper

A_PROBLEM = 100
"""Launches for each of which there is to be a different problem."""
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
    def launches(self) -> int:
        """Launches without a failure that bound the rate by this much."""
        return needed(self.rate, self.confidence)

    @property
    def problems(self) -> int:
        """Different problems that these launches are to be of."""
        return -(-self.launches // A_PROBLEM)


@dataclass(frozen=True, slots=True)
class Bound:
    """What one regime showed of one compiled kernel, over all buckets that it serves.

    `launches` were checked, on `problems` different problems, and `failures` of them went wrong; at
    `confidence` the rate of failing launches, in this regime, is at most `upper`.
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


def codes(rows: Iterable[Evidence]) -> dict[Where, str]:
    """The digest of the machine code that ran, by what it ran for.

    From evidence whose ``detail["code"]`` says so; where different digests ran, all of them.
    """
    found: dict[Where, dict[str, None]] = {}
    for row in rows:
        if row.detail.get("code"):
            found.setdefault(row.where, {})[str(row.detail["code"])] = None
    return {where: " ".join(sorted(digests)) for where, digests in found.items()}


def kernel(where: Where, known: Mapping[Where, str]) -> Kernel:
    """The compiled kernel that serves a bucket, as far as it is known.

    Its code digest tells kernels apart where there is one (`codes`); else the backend and the
    tactic do, with what no kernel is shared across: format and dtypes.
    """
    bucket = where.bucket
    parts = (where.backend, where.tactic, bucket.format, bucket.activation, bucket.out_dtype)
    code = known.get(where)
    return (*parts, code) if code else parts


def pool(
    rows: Iterable[Evidence], confidence: float = DEFAULT_CONFIDENCE
) -> dict[Kernel, dict[str, Bound]]:
    """Kernel -> regime -> bound, from evidence on exact problems that passed or failed.

    A failure without a count (a crash, a hang, an error) is one failing launch.
    """
    rows = list(rows)
    known = codes(rows)
    counts: dict[Kernel, dict[str, list[int]]] = {}
    for row in rows:
        if row.data != EXACT or row.status not in ("passed", "failed"):
            continue
        if row.regime in UNCHECKED:
            continue
        launches, problems, failures = row.launches, row.problems, 0
        if row.status == "failed":
            failures = max(1, int(row.detail.get("bad_launches") or 0))
            launches, problems = max(launches, failures), max(problems, 1)
        if not launches:
            continue
        key = kernel(row.where, known)
        found = counts.setdefault(key, {}).setdefault(row.regime, [0, 0, 0])
        for place, value in enumerate((launches, problems, failures)):
            found[place] += value
    return {
        key: {
            regime: Bound(regime, launches, problems, failures, bound, confidence)
            for regime, (launches, problems, failures) in regimes.items()
            for bound in (upper(failures, launches, confidence),)
        }
        for key, regimes in counts.items()
    }


def worst(bounds: Mapping[str, Bound]) -> float:
    """The largest bound of any regime; 1 where there is none."""
    return max((b.upper for b in bounds.values()), default=1.0)


def short_of_aim(regime: str, bound: Bound | None, aim: Aim) -> str | None:
    """Why this regime did not reach the aim, in words; None where it did."""
    found = bound.upper if bound else inf
    if found > aim.rate:
        said = f"{bound.upper:.1g} only" if bound and bound.upper < 1 else "nothing"
        return f"{regime}: failure rate bounded by {said}, {aim.rate:.1g} was asked for"
    if bound and bound.problems < aim.problems:
        return (
            f"{regime}: {bound.launches} launches of {bound.problems} different problems only, "
            f"{aim.problems} are asked for"
        )
    return None
