"""How long a probe will take: as earlier ones of such a device did, corrected as it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..cache.ledger import Ledger
from ..cache.rows import Probed, Run
from .plan import Plan
from .verdict.buckets import ranges
from .verdict.statistics import median

_UNKNOWN = {
    ("cuda", "quick"): (75.0, 15.0),
    ("cuda", "standard"): (75.0, 140.0),
    ("cuda", "soak"): (75.0, 1200.0),
    ("cpu", "quick"): (15.0, 20.0),
    ("cpu", "standard"): (20.0, 60.0),
    ("cpu", "soak"): (20.0, 600.0),
}
"""Seconds of loading and building, and of a layer, where nothing is known of such a device: what an
H200 took at ``standard`` with six backends (107, 138 and over 180 a layer), and a CPU with two
cores; at ``quick`` what one took before levels were launches, and at ``soak``, which no run has
timed, a guess."""
_BACKENDS = 6
"""A GPU's seconds are those of so many; with fewer they are fewer."""
_LAST = 40
"""Layers of earlier probes that are looked at."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds of loading and building, and of each of so many layers. `known` says whether a probe
    of this model and level was made here before."""

    build: float
    layer: float
    layers: int
    known: bool = False
    budget: float | None = None

    @property
    def seconds(self) -> float:
        whole = self.build + self.layer * self.layers
        return whole if self.budget is None else min(whole, self.budget)


def forecast(plan: Plan, ledger: Ledger) -> Forecast:
    """What is known before a probe begins. Layers that were probed before count for nothing."""
    kind, level = plan.target.device.kind, plan.level.name
    build, layer = _UNKNOWN.get((kind, level), _UNKNOWN[kind, "standard"])
    if kind == "cuda":
        share = min(1.0, len(plan.backends) / _BACKENDS)
        build, layer = share * build, share * layer
    runs = {
        run.id: run
        for run in ledger.runs()
        if run.device.get("name") == plan.target.name and run.level == level
    }
    rows = [row for row in ledger.probed() if row.run in runs and row.bucket.n][-_LAST:]
    seconds = [taken for row in rows if (taken := _seconds(row, plan))]
    builds = [taken for run in runs.values() if (taken := _building(run, rows)) is not None]
    if seconds:
        layer = median(seconds)
    if builds:
        build = median(builds)
    return Forecast(build, layer, _layers_left(plan, rows), bool(seconds), plan.budget)


def _seconds(row: Probed, plan: Plan) -> float | None:
    """What a layer took, brought to the number of buckets that this plan's layers have."""
    began = _began(row)
    if not began or row.at is None:
        return None
    taken = row.at - min(began)
    most = max(problem.m for problem in plan.problems)
    return taken * len(ranges(most)) / max(1, len(ranges(row.bucket.m_hi)))


def _building(run: Run, rows: Sequence[Probed]) -> float | None:
    """Seconds from a run's start to its first layer."""
    began = [at for row in rows if row.run == run.id for at in _began(row)]
    return min(began) - run.started if began else None


def _began(row: Probed) -> list[float]:
    """When those that the row's own run measured were begun; none where another version wrote it
    in another way."""
    try:
        entrants = row.detail["entrants"].values()
        return [float(e["at"]) for e in entrants if e["runs"] == [row.run]]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _layers_left(plan: Plan, rows: Sequence[Probed]) -> int:
    """Layers that are likely to be measured: not those that were, nor W4A4 before SM100."""
    done = {(r.bucket.format, r.bucket.activation, r.bucket.n, r.bucket.k) for r in rows}
    able = (plan.target.device.sm or 0) >= 100
    asked = [p for p in plan.problems if p.activation == "bf16" or able]
    new = [p for p in asked if (p.format, p.activation, p.n, p.k) not in done or plan.again]
    return len(new if asked else plan.problems)


@dataclass(slots=True)
class Pace:
    """How far a probe is. Times are seconds since its start; layers are numbered from 1."""

    forecast: Forecast
    at: int = 0
    of: int = 0
    began: float = 0.0
    taken: list[float] = field(default_factory=list)
    _shown: float = 0.0

    def layer(self, number: int, of: int, now: float) -> bool:
        """A step of a layer is told; whether it is the layer's first."""
        if number == self.at:
            return False
        if self.at:
            self.taken.append(now - self.began)
        self.at, self.of, self.began = number, of, now
        return True

    def left(self, now: float) -> float:
        """Seconds that are likely to be left."""
        f = self.forecast
        if not self.at:
            rest = max(f.build - now, 0.1 * f.build) + f.layer * f.layers
        else:
            each = sum(self.taken) / len(self.taken) if self.taken else f.layer
            rest = max(each - (now - self.began), 0.1 * each) + each * (self.of - self.at)
        return rest if f.budget is None else min(rest, max(f.budget - now, 1.0))

    def share(self, now: float) -> float:
        """How much is done, from 0 to 1; never less than it was."""
        left = self.left(now)
        self._shown = max(self._shown, min(0.99, now / (now + left) if now + left else 0.0))
        return self._shown


def in_words(seconds: float) -> str:
    """A time as one says it: ``20 s``, ``4 min``, ``2 h``."""
    if seconds < 90:
        step = 1 if seconds < 10 else 5
        return f"{max(1, round(seconds / step) * step)} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
