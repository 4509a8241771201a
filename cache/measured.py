"""Times with their intervals, and the order of what is faster. Pure; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

NOISE = 0.01
"""Candidates within 1 % of the fastest count as equal, and a fixed order decides. Two probes that
measure each time to 0.5 % then choose candidates that differ by less than 2 %. So do candidates
whose intervals overlap that of the fastest: what was not told apart is equal."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A time in microseconds with its interval; without one its ends are the time itself."""

    us: float
    lo: float
    hi: float

    def level_with(self, fastest: Measured) -> bool:
        """Whether this counts as fast as `fastest`, whose time is not larger: within the band, or
        not told apart from it."""
        return self.us <= fastest.us * (1 + NOISE) or self.lo <= fastest.hi


def measured(us: float | None, lo: float | None, hi: float | None) -> Measured | None:
    """A time as a row has it; None without one."""
    if us is None:
        return None
    return Measured(us, us if lo is None else lo, us if hi is None else hi)


def fastest_of(times: Mapping[str, Measured]) -> Measured:
    """The least of some times; ValueError where there is none."""
    return min(times.values(), key=lambda t: (t.us, t.hi))


def in_order(times: Mapping[str, Measured], default: str | None = None) -> list[str]:
    """Names by their times, the fastest first. Of equals `default` comes first, then names decide;
    nothing that looks slower than the default comes before it."""
    order = []
    left = dict(times)
    while left:
        fastest = fastest_of(left)
        usual = left.get(default or "")
        most = inf if usual is None else usual.us * (1 + NOISE)
        level = [n for n, t in left.items() if t.level_with(fastest) and t.us <= most]
        order.append(min(level, key=lambda name: (name != default, name)))
        del left[order[-1]]
    return order
