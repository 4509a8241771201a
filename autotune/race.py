"""The race: which of a bucket's candidates are still in it, from samples taken in turn.

Successive elimination by paired measurements. In each round every candidate that is left is
sampled once, one after the other, so that drift of clocks and temperature hits all of a round
alike; what is judged is the logarithm of the ratio of two samples of one round, in which it
cancels. A candidate is out once a Student t interval (`statistics.mean_interval`) of that logarithm
against the present leader lies beyond the noise band. Rounds and rivals share the doubt
(Bonferroni: a candidate is looked at after each round, and may lose to each of the others). So
where these logarithms are normal, a bucket's fastest is lost with a probability of at most `DOUBT`;
tails heavier than that widen the intervals. The scheme is successive elimination (Even-Dar, Mannor
and Mansour, Journal of Machine Learning Research 7, 2006), with intervals from measured variances.

A race is pure: the same samples always give the same outcome. `run_races` takes the samples.
Workers are asked for several in one message. Of the m ranges that are still open `AT_ONCE` are
sampled together: each worker in turn samples all its candidates there, and every second round goes
backwards, so that candidates of one bucket are milliseconds apart and none is always behind the
same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log, log1p

from ..cache.measured import NOISE
from .verdict.buckets import MRange
from .verdict.statistics import mean_interval, median

DOUBT = 0.05
"""How probable it may be that a bucket's fastest candidate is dropped."""
LEAST = 3
"""Rounds before an interval may drop anything."""
FAR = 1.5
"""A candidate this many times as slow as the leader in each of `QUICK` rounds is out at once: what
disturbs one sample by half of itself does not do so twice, and to one candidate alone."""
QUICK = 2
SETTLED = 6
"""Rounds that those who stay in get at least: the fewest with an interval of the median at 95 %."""
AT_ONCE = 4
PRECISE = 0.005
"""A half-width of the ratio that decides: further samples would show differences that do not
matter."""


@dataclass(slots=True)
class Race:
    """One bucket's race. `names` are its candidates, `rounds` the most there may be.

    Those in `lines` are measured and compete with nobody: they stay as long as there are others.
    """

    names: tuple[str, ...]
    rounds: int
    band: float = NOISE
    lines: frozenset[str] = frozenset()
    least: int = SETTLED
    """Rounds before those who stay may be done."""
    samples: dict[str, list[float]] = field(init=False)
    alive: list[str] = field(init=False)
    """Still in it, in the order of `names`."""
    over: bool = field(init=False, default=False)
    """Nothing more need be sampled: decided, or at the last round."""
    margin: float | None = field(init=False, default=None)
    """Half-width, at 95 %, of the least known ratio to the leader among those left; None where one
    alone is left, or not yet known."""

    def __post_init__(self) -> None:
        self.samples = {name: [] for name in self.names}
        self.alive = list(self.names)
        self.over = not self.alive

    @property
    def leader(self) -> str | None:
        """Of those that compete and are left, the fastest so far; the first by name of equals."""
        able = [name for name in self._able() if self.samples[name]]
        return min(able, key=lambda n: (_mean(_logs(self.samples[n])), n), default=None)

    @property
    def winner(self) -> str:
        """Of those left whose median is within the band of the least, the first of `names`."""
        times = {name: median(self.samples[name]) for name in self.alive}
        best = min(times.values())
        return next(name for name, us in times.items() if us <= best * (1 + self.band))

    def drop(self, name: str) -> None:
        """`name` cannot be sampled any more; what was measured of it is forgotten."""
        self.alive = [other for other in self.alive if other != name]
        self.samples.pop(name, None)
        self.over = self.over or not self.alive

    def add(self, taken: Mapping[str, float]) -> None:
        """One round: microseconds of every candidate in `alive`."""
        for name in self.alive:
            self.samples[name].append(taken[name])
        leader = self.leader
        out = set() if leader is None else {n for n in self._able() if self._beaten(n, leader)}
        self.alive = [name for name in self.alive if name not in out]
        done = max((len(self.samples[name]) for name in self.alive), default=0)
        ends = [] if leader is None else [self._against(n, leader) for n in self._others(leader)]
        widths, highs = [(high - low) / 2 for low, high in ends], [high for _, high in ends]
        self.margin = max(widths, default=None)
        known = all(
            h <= log1p(self.band) or w <= PRECISE for h, w in zip(highs, widths, strict=True)
        )
        settled = done >= min(self.least, self.rounds)
        self.over = done >= self.rounds or not self.alive or (settled and known)

    @property
    def open_question(self) -> bool:
        """Whether the last round ended it with a ratio that is less well known than the band."""
        return self.over and self.margin is not None and self.margin > self.band

    def levelled(self, name: str) -> list[float]:
        """The samples of `name`, as they would be over the rounds that the leader ran.

        Who dropped out early was measured on a cooler or warmer device: its samples are scaled by
        the leader's median over all rounds to that over those they shared.
        """
        mine, leader = self.samples[name], self.leader
        best = self.samples[leader] if leader else mine
        if len(mine) >= len(best) or not mine:
            return list(mine)
        factor = median(best) / median(best[: len(mine)])
        return [factor * value for value in mine]

    def _able(self) -> list[str]:
        return [name for name in self.alive if name not in self.lines]

    def _others(self, leader: str) -> list[str]:
        return [name for name in self._able() if name != leader]

    def _ratios(self, name: str, leader: str) -> list[float]:
        mine, best = self.samples[name], self.samples[leader]
        return [log(a) - log(b) for a, b in zip(mine, best, strict=True)]

    def _beaten(self, name: str, leader: str) -> bool:
        if name == leader:
            return False
        ratios = self._ratios(name, leader)
        if len(ratios) == QUICK:
            return all(ratio > log(FAR) for ratio in ratios)
        if len(ratios) < LEAST:
            return False
        looks = max(1, self.rounds - LEAST + 1)
        rivals = max(1, len(self.names) - len(self.lines) - 1)
        # Two-sided, and only one side of it drops anything.
        low, _ = mean_interval(ratios, 1 - 2 * DOUBT / (looks * rivals))
        return low > log1p(self.band)

    def _against(self, name: str, leader: str) -> tuple[float, float]:
        return mean_interval(self._ratios(name, leader), 0.95)


def _logs(samples: Sequence[float]) -> list[float]:
    return [log(value) for value in samples]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


Place = tuple[str, int]
"""A worker's name, and the index of what it times."""
Ask = Callable[[str, list[int]], list[float] | None]
"""Microseconds of one sample of each index, from the worker of that name; None if it is lost."""


def run_races(
    races: Mapping[MRange, Race],
    places: Mapping[tuple[MRange, str], Place],
    ask: Ask,
    each_round: Callable[[], None] = lambda: None,
) -> None:
    """Run all `races` to their end. `places` is where a range's candidate is sampled."""
    turn = 0
    while running := [m for m, race in races.items() if not race.over]:
        step = -1 if turn % 2 else 1
        for start in range(0, len(running), AT_ONCE):
            group = running[::step][start : start + AT_ONCE]
            _one_round({m: races[m] for m in group}, races, places, ask, step)
        each_round()
        turn += 1


def _one_round(
    group: Mapping[MRange, Race],
    races: Mapping[MRange, Race],
    places: Mapping[tuple[MRange, str], Place],
    ask: Ask,
    step: int,
) -> None:
    taken: dict[MRange, dict[str, float]] = {m: {} for m in group}
    wanted: dict[str, list[tuple[MRange, str, int]]] = {}
    for m, race in group.items():
        for name in race.alive[::step]:
            worker, index = places[m, name]
            wanted.setdefault(worker, []).append((m, name, index))
    for worker in sorted(wanted)[::step]:
        mine = wanted[worker]
        found = ask(worker, [index for _, _, index in mine])
        if found is None:
            for (m, name), (other, _) in places.items():
                if other == worker:
                    races[m].drop(name)
            continue
        for (m, name, _), us in zip(mine, found, strict=True):
            taken[m][name] = us
    for m, race in group.items():
        if race.alive:
            race.add(taken[m])
