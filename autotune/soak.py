"""Repeating regimes on fresh problems until the failure rate of each kernel is bounded as asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from threading import Lock

from ..cache.rows import BucketKey, Evidence
from .verdict.bounds import Aim, Bound, codes, kernel, pool

CHAIN = 1024
"""Launches of a turn, about: each on rows of its own as far as the pools have them."""
REPEATS = 2
"""How often a turn's chain is launched: more would cost time and add no problem."""


@dataclass(slots=True)
class Purse:
    """What a probe may still spend on its aim: seconds in all, launches per kernel and regime.

    `parts` is how many (backend, layer, regime) are still to come: each takes an equal share of
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

    def share(self) -> float:
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


@dataclass(slots=True)
class Share:
    """The part of a purse that one backend has for one regime of one layer."""

    purse: Purse
    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def empty(self) -> bool:
        return time.monotonic() - self.start >= self.seconds

    def close(self) -> None:
        self.purse.spend(time.monotonic() - self.start)


def open_share(purse: Purse) -> Share:
    return Share(purse, purse.share())


def lacking(
    purse: Purse,
    rows: Sequence[Evidence],
    backend: str,
    buckets: Sequence[tuple[str, BucketKey]],
    regime: str,
) -> list[bool]:
    """Which of these (tactic, bucket) run a kernel that needs more problems in this regime."""
    mine = [row for row in list(rows) if row.backend == backend]
    known, found = codes(mine), pool(mine, purse.aim.confidence)
    return [
        purse.short(found.get(kernel(backend, tactic, bucket, known), {}).get(regime))
        for tactic, bucket in buckets
    ]


def windows(ms: int) -> int:
    """Windows for each m of a turn whose items have `ms` values of m together."""
    return max(1, CHAIN // max(1, ms))
