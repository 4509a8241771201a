"""The time goes where the choice is: launches of the fastest that are right, until they are proven.

All candidates were graded, timed and tried briefly. Now the fastest of each bucket is launched as
often as the level aims at, and the next one a tenth as often, so that a quarantine has a successor
that is known to be good; so are the floor and what the engine would take by itself. One that fails
here makes way for the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from ...probes.launch.item import LaunchAim
from ...probes.regimes import ALONE
from ...words import CERTAIN, CHANCE, EVERY_M
from .. import budget
from ..evidence.recorder import Recorder
from ..layer import Entrant, ProbedLayer
from ..regime import Wanted, at_length, passed_briefly, run_every_m
from ..verdict.buckets import MRange

LESS = 10
"""What is second is launched so many times less often, and so is anything in a regime where no
fault waits for chance."""
FEWEST_PROBLEMS = 3
"""In such a regime problems are fewer by this only."""

FAST_US = 50.0
"""A kernel faster than this is launched until its aim is reached; a slower one for its share."""
FAST_SHARES = 10.0
"""Shares of time after which a fast one is left, too."""

HOST_S = 3e-4
"""Seconds of the host that a launch of a new m takes, about."""
PATIENCE = 10.0
"""Times longer than it is thought to take is what every m of a range may take."""
EVERY_M_MOST = 6.0
"""Seconds that it may take of routed experts on a GPU, where all of it takes longer: it is a sample
then, and that is told."""
EVERY_M_LEAST = 1.0
"""Seconds that it may take whatever is thought: a host that is busy may not run us for as long."""

Depths = dict[tuple[str, MRange], int]
"""By backend and range: how many times less than the aim it was launched. 1 is all of it."""


def prove(
    layer: ProbedLayer,
    entrants: Sequence[Entrant],
    record: Recorder,
    say: Callable[[str], None],
    wanted: Wanted,
    pool: Executor | None = None,
) -> None:
    """Launch the fastest of every bucket until its aim is reached, or the time is over."""
    tried = [e for e in entrants if e.winner and not (e.reference_line or e.known)]
    by_name = {entrant.name: entrant for entrant in tried}
    done: Depths = {}
    wanted = replace(wanted, until=max(wanted.until, time.monotonic() + wanted.least))

    def right(name: str, m: MRange) -> bool:
        return wanted.right(layer.where(by_name[name], m, by_name[name].winner[m]))

    while time.monotonic() < wanted.until:
        orders = _fastest_first(layer, tried, right)
        wave = _lacking(orders, done, wanted)
        if not wave:
            return
        mine = [by_name[name] for name in dict.fromkeys(name for name, _ in wave)]
        runs = _runs_of_wave(layer, mine, wave, wanted, record)
        _launch(layer, runs, wanted.until, record, say, pool)
        done.update(wave)


def _fastest_first(
    layer: ProbedLayer, tried: Sequence[Entrant], right: Callable[[str, MRange], bool]
) -> dict[MRange, list[str]]:
    """The candidates of each range that are right, the fastest first."""
    times = {entrant.name: entrant.median_us for entrant in tried}
    by_name = {entrant.name: entrant for entrant in tried}
    orders = {
        m: layer.named_first([n for n in budget.order(times, m) if m in by_name[n].winner])
        for m in layer.ranges
    }
    if layer.agreement:
        scope = (layer.target.name, layer.problem, "proven")
        orders = {m: layer.agreement.order(scope, m, own) for m, own in orders.items()}
    return {m: [name for name in names if right(name, m)] for m, names in orders.items()}


def _lacking(orders: Mapping[MRange, Sequence[str]], done: Depths, wanted: Wanted) -> Depths:
    """What is to be launched now: who comes first in a range and has less than all of the aim, and
    who comes second, or is wanted anyway, and has nothing. Where more than two are to be proven,
    all but the last of these come first."""
    wave: Depths = {}
    for m, names in orders.items():
        for place, name in enumerate(names):
            if place >= wanted.enough and name not in wanted.also:
                continue
            less = 1 if place < wanted.enough - 1 else LESS
            if done.get((name, m), LESS + 1) > less:
                wave[name, m] = less
    return wave


@dataclass(frozen=True, slots=True)
class _LongRun:
    """One ask of a worker: a regime, or every m, of one backend in some ranges.

    `aim` has the seconds that each of them may take.
    """

    entrant: Entrant
    regime: str
    only: tuple[MRange, ...]
    aim: LaunchAim

    @property
    def seconds(self) -> float:
        return self.aim.seconds * len(self.only)

    def share(self, later: float, left: float) -> float:
        """Seconds that each range gets, where what comes `later` may take so many and there are so
        many `left`: what it may take, or its part of what is left."""
        return min(1.0, left / (self.seconds + later)) * self.aim.seconds


@dataclass(frozen=True, slots=True)
class _WaveRuns:
    """What a wave asks of workers: one at a time, then of each worker side by side."""

    alone: Sequence[_LongRun]
    beside: Sequence[Sequence[_LongRun]]


def _runs_of_wave(
    layer: ProbedLayer, mine: Sequence[Entrant], wave: Depths, wanted: Wanted, record: Recorder
) -> _WaveRuns:
    """Every regime in which much is to be shown, and every m."""
    names = [n for n in layer.regimes if n in wanted.regimes and n in CHANCE | CERTAIN]

    def runs(entrant: Entrant, alone: bool) -> list[_LongRun]:
        chosen = [name for name in names if (name in ALONE) == alone]
        return [r for n in chosen for r in _in_regime(layer, entrant, n, wave, wanted, record)]

    beside = []
    for entrant in mine:
        both = [*runs(entrant, False), _every_m(layer, entrant, wave, wanted)]
        second = [r for r in both if entrant.runner_of(r.regime) is not entrant.runner]
        beside += [second, [r for r in both if r not in second]]
    return _WaveRuns([run for entrant in mine for run in runs(entrant, True)], beside)


def _launch(
    layer: ProbedLayer,
    runs: _WaveRuns,
    until: float,
    record: Recorder,
    say: Callable[[str], None],
    pool: Executor | None,
) -> None:
    """One wave, `until` then (of `time.monotonic`) at most."""
    whole = [sum(run.seconds for run in each) for each in runs.beside]
    after = max(whole) if pool else sum(whole)

    def launch(mine: Sequence[_LongRun], after: float = 0.0) -> None:
        later = sum(run.seconds for run in mine) + after
        for run in mine:
            later -= run.seconds
            left = until - time.monotonic()
            if left <= 0:
                return
            each = run.share(later, left)
            _launch_one(layer, replace(run, aim=replace(run.aim, seconds=each)), record, say)

    with layer.clock.spent("at length, one at a time"):
        launch(runs.alone, after)
    with layer.clock.spent("at length, side by side"):
        if pool:
            list(pool.map(launch, runs.beside))
        else:
            launch([run for each in runs.beside for run in each])


def _launch_one(
    layer: ProbedLayer, run: _LongRun, record: Recorder, say: Callable[[str], None]
) -> None:
    entrant, name = run.entrant, run.regime
    if name in entrant.dead:
        return
    if name == EVERY_M:
        say(f"every m: {entrant.name}")
        with layer.clock.spent("every m", entrant.name):
            run_every_m(layer, entrant, record, run.only, run.seconds)
        return
    say(f"{name} at length: {entrant.name}")
    with layer.clock.spent(f"{name} at length", entrant.name):
        at_length(layer, entrant, name, record, run.only, run.aim)


def _in_regime(
    layer: ProbedLayer, entrant: Entrant, name: str, wave: Depths, wanted: Wanted, record: Recorder
) -> list[_LongRun]:
    """What is asked of a backend in one regime."""
    found = []
    for less, ms in _by_depth(wave, entrant.name).items():
        aim = _aim(wanted.aim, less * (LESS if name in CERTAIN else 1))
        passed = [m for m in ms if passed_briefly(layer, entrant, name, m, record)]
        for only, shares in _by_speed(layer, entrant, passed, first=less == 1):
            mine = replace(aim, seconds=shares * aim.seconds)
            found.append(_LongRun(entrant, name, tuple(only), mine))
    return found


def _every_m(layer: ProbedLayer, entrant: Entrant, wave: Depths, wanted: Wanted) -> _LongRun:
    """Every m of the ranges in which a backend is to be launched."""
    only = tuple(m for name, m in wave if name == entrant.name)
    needed = sum((m.hi - m.lo + 1) * (HOST_S + 1e-6 * entrant.median_us.get(m, 0.0)) for m in only)
    seconds = max(EVERY_M_LEAST, PATIENCE * needed)
    if layer.problem.groups > 1 and layer.target.device.kind == "cuda":
        seconds = min(seconds, EVERY_M_MOST)
    return _LongRun(entrant, EVERY_M, only, replace(wanted.aim, seconds=seconds / len(only)))


def _by_depth(wave: Depths, name: str) -> dict[int, list[MRange]]:
    """The ranges in which one backend is to be launched, by how many times less than the aim."""
    found: dict[int, list[MRange]] = {}
    for (who, m), less in wave.items():
        if who == name:
            found.setdefault(less, []).append(m)
    return found


def _by_speed(
    layer: ProbedLayer, entrant: Entrant, ms: Sequence[MRange], first: bool
) -> list[tuple[list[MRange], float]]:
    """The ranges where the kernel is fast enough to reach the aim, and those where it is not, each
    with how many shares of time it may take. On a CPU all have the same; on a GPU a slow one that
    does not come `first` has a tenth of the time of one that does, as of its launches: the floor is
    slow in every range."""
    if layer.target.device.kind == "cpu":
        return [(list(ms), 1.0)] if ms else []
    fast = [m for m in ms if entrant.median_us.get(m, 0.0) < FAST_US]
    slow = [m for m in ms if m not in fast]
    shares_of_slow = 1.0 if first else 1 / FEWEST_PROBLEMS
    return [
        (only, shares) for only, shares in ((fast, FAST_SHARES), (slow, shares_of_slow)) if only
    ]


def _aim(aim: LaunchAim, less: int) -> LaunchAim:
    """An aim for `less` times fewer launches; problems are fewer by a third of that, time by its
    root."""
    if less == 1:
        return aim
    return LaunchAim(
        -(-aim.launches // less),
        -(-aim.problems * FEWEST_PROBLEMS // less),
        aim.seconds * FEWEST_PROBLEMS / less,
    )
