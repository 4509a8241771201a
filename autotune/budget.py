"""What a probe may spend: seconds in all.

Two proven candidates are enough in a bucket, so that a quarantine has a proven successor. So per
bucket the two fastest go through the regimes first, then as many more as are lacking, until two are
proven or nothing is left. What was not tried is never safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, inf, log

from .verdict.buckets import MRange

ENOUGH = 2
"""Proven candidates of a bucket, after which the slower ones are left; of a plan that does not say
otherwise."""
SLOWER = "slower than two that are proven"
OVER = "the time budget had ended"
FOR_BUILDS = 0.5
"""The most of a time budget that compilers get: without a measurement nothing is gained by it."""
A_BUILD = 10.0
"""Seconds that they get in any case, within the budget: what has little to compile takes few."""


@dataclass(frozen=True, slots=True)
class TimeBudget:
    """`seconds` from `start` (of `time.monotonic`), which is when the probe began to build."""

    seconds: float
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


def order(times: Mapping[str, Mapping[MRange, float]], m: MRange) -> list[str]:
    """Backends by their time in an m range, fastest first, ties by name; untimed ones last.

    `times` is by backend. An empty batch has no time: it goes with the smallest real range.
    """
    if m.hi == 0:
        m = min((r for mine in times.values() for r in mine if r.hi), default=m)
    return sorted(times, key=lambda name: (times[name].get(m, inf), name))


def best_of_all(
    times: Mapping[str, Mapping[MRange, float]], ranges: Sequence[MRange]
) -> str | None:
    """The backend that is the least slower than the fastest, by the mean of the logarithms, of
    those that have a time in every range; None where none has."""
    whole = {name: mine for name, mine in times.items() if all(m in mine for m in ranges)}
    if not ranges or not whole:
        return None
    fastest = {m: min(mine[m] for mine in times.values() if m in mine) for m in ranges}

    def slower(name: str) -> float:
        return fsum(log(whole[name][m] / fastest[m]) for m in ranges)

    return min(whole, key=lambda name: (slower(name), name))


def next_wave(
    orders: Mapping[MRange, Sequence[str]],
    tried: Mapping[MRange, Sequence[str]],
    proven: Callable[[str, MRange], bool],
    also: Collection[str] = (),
    enough: int = ENOUGH,
) -> dict[str, list[MRange]]:
    """Who goes through the regimes next, in which ranges: as many as a range lacks of `enough`, and
    those in `also` wherever they come.

    `orders` has each range's candidates, the fastest first; `tried` those that did already. Empty
    where nothing is lacking, or nobody is left.
    """
    wave: dict[str, list[MRange]] = {}
    for m, names in orders.items():
        done = tried.get(m, ())
        short = enough - sum(proven(name, m) for name in done)
        left = [n for n in names if n not in done]
        for name in [n for at, n in enumerate(left) if at < short or n in also]:
            wave.setdefault(name, []).append(m)
    return wave
