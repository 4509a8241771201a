"""What a probe may spend: seconds in all, and launches on bounding failure rates.

Within a limit of time two proven candidates are enough in a bucket, so that a quarantine has a
proven successor. So per bucket the two fastest go through the regimes first, then as many more as
are lacking, until two are proven or nothing is left; the floor, mostly the slowest, comes in its
place. What was not tried is never safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from threading import Lock

from ..cache.rows import Evidence, Where
from .verdict.bounds import Aim, Bound, codes, kernel, pool
from .verdict.buckets import MRange

ENOUGH = 2
"""Proven candidates of a bucket, after which the slower ones are left."""
SLOWER = "slower than two that are proven"
OVER = "the time budget had ended"
CHAIN = 1024
"""Launches of a turn, about: each on rows of its own as far as the pools have them."""
REPEATS = 2
"""How often a turn's chain is launched: more would cost time and add no problem."""


@dataclass(frozen=True, slots=True)
class TimeBudget:
    """`seconds` from `start` (of `time.monotonic`), which is when the probe began to build.

    `proven` says of a tactic in a bucket whether its verdict, as far as known, is safe.
    """

    seconds: float
    proven: Callable[[Where], bool]
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds, 0 where it is over."""
        return max(0.0, self.end - time.monotonic())

    @property
    def end(self) -> float:
        """When it is over, of `time.monotonic`."""
        return self.start + self.seconds

    @property
    def over(self) -> bool:
        return self.left <= 0


@dataclass(slots=True)
class LaunchBudget:
    """What a probe may still spend on its aim: seconds in all, launches per kernel and regime.

    `parts` is how many (backend, layer, regime) are still to come: each takes an equal part of
    what is left, so that none starves those behind it. Backends that run at once each spend. Only
    in `regimes`, which a verdict needs, is anything spent.
    """

    aim: Aim
    seconds: float
    launches: int | None = None
    parts: int = 1
    regimes: tuple[str, ...] = ()
    until: float = inf
    """When the probe's time budget ends, of `time.monotonic`."""
    spent: float = field(default=0.0, init=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def part(self) -> float:
        """Seconds for the next part, which is then no longer to come."""
        with self._lock:
            rest = min(self.seconds - self.spent, self.until - time.monotonic())
            left = max(0.0, rest) / max(1, self.parts)
            self.parts -= 1
        return left

    def spend(self, seconds: float) -> None:
        with self._lock:
            self.spent += seconds

    def short(self, bound: Bound | None) -> bool:
        """Whether a kernel needs more in a regime, and may have it."""
        if bound is None:
            return True
        if bound.failures or bound.upper <= self.aim.rate:
            return False
        return self.launches is None or bound.launches < self.launches


def order(times: Mapping[str, Mapping[MRange, float]], m: MRange) -> list[str]:
    """Backends by their time in an m range, fastest first, ties by name; untimed ones last.

    `times` is by backend. An empty batch has no time: it goes with the smallest real range.
    """
    if m.hi == 0:
        m = min((r for mine in times.values() for r in mine if r.hi), default=m)
    return sorted(times, key=lambda name: (times[name].get(m, inf), name))


def next_wave(
    orders: Mapping[MRange, Sequence[str]],
    tried: Mapping[MRange, Sequence[str]],
    proven: Callable[[str, MRange], bool],
) -> dict[str, list[MRange]]:
    """Who goes through the regimes next, in which ranges: as many as a range lacks of `ENOUGH`.

    `orders` has each range's candidates, the fastest first; `tried` those that did already. Empty
    where nothing is lacking, or nobody is left.
    """
    wave: dict[str, list[MRange]] = {}
    for m, names in orders.items():
        done = tried.get(m, ())
        short = ENOUGH - sum(proven(name, m) for name in done)
        for name in [n for n in names if n not in done][: max(0, short)]:
            wave.setdefault(name, []).append(m)
    return wave


def lacking(
    budget: LaunchBudget, rows: Sequence[Evidence], tried: Sequence[Where], regime: str
) -> list[bool]:
    """Which of the tactics in `tried`, all of one backend, run a kernel that needs more problems
    in this regime; `rows` is all evidence on exact problems so far."""
    backends = {where.backend for where in tried}
    mine = [row for row in list(rows) if row.backend in backends]
    known, found = codes(mine), pool(mine, budget.aim.confidence)
    return [budget.short(found.get(kernel(where, known), {}).get(regime)) for where in tried]


def windows(ms: int) -> int:
    """Windows for each m of a turn whose items have `ms` values of m together."""
    return max(1, CHAIN // max(1, ms))
