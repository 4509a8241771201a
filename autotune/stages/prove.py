"""The time goes where the choice is: launches of the fastest that are right, until they are proven.

All candidates were graded, timed and tried briefly. Now the fastest of each bucket is launched as
often as the level aims at, and the next one a tenth as often, so that a quarantine has a successor
that is known to be good; so are the floor and what the engine would take by itself. One that fails
here makes way for the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace

from ...probes.launch.item import LaunchAim
from ...probes.regimes import ALONE
from ...words import CERTAIN, CHANCE
from .. import budget
from ..evidence.recorder import Recorder
from ..layer import Entrant, ProbedLayer
from ..regime import Wanted, at_length, run_every_m
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

    def right(name: str, m: MRange) -> bool:
        return wanted.right(layer.where(by_name[name], m, by_name[name].winner[m]))

    while time.monotonic() < wanted.until:
        orders = _fastest_first(layer, tried, right)
        wave = _lacking(orders, done, wanted.also)
        if not wave:
            return
        _prove_wave(layer, by_name, wave, wanted, (record, say, pool))
        done.update(wave)


def _fastest_first(
    layer: ProbedLayer, tried: Sequence[Entrant], right: Callable[[str, MRange], bool]
) -> dict[MRange, list[str]]:
    """The candidates of each range that are right, the fastest first."""
    times = {entrant.name: entrant.median_us for entrant in tried}
    by_name = {entrant.name: entrant for entrant in tried}
    orders = {
        m: [name for name in budget.order(times, m) if m in by_name[name].winner]
        for m in layer.ranges
    }
    if layer.agreement:
        scope = (layer.target.name, layer.problem, "proven")
        orders = {m: layer.agreement.order(scope, m, own) for m, own in orders.items()}
    return {m: [name for name in names if right(name, m)] for m, names in orders.items()}


def _lacking(orders: Mapping[MRange, Sequence[str]], done: Depths, also: Collection[str]) -> Depths:
    """What is to be launched now: who comes first in a range and has less than all of the aim, and
    who comes second, or is wanted anyway, and has nothing."""
    wave: Depths = {}
    for m, names in orders.items():
        for place, name in enumerate(names):
            if place > 1 and name not in also:
                continue
            less = 1 if place == 0 else LESS
            if done.get((name, m), LESS + 1) > less:
                wave[name, m] = less
    return wave


def _prove_wave(
    layer: ProbedLayer,
    by_name: Mapping[str, Entrant],
    wave: Depths,
    wanted: Wanted,
    to: tuple[Recorder, Callable[[str], None], Executor | None],
) -> None:
    """One wave: every regime in which much is to be shown, and every m."""
    record, say, pool = to
    mine = [by_name[name] for name in dict.fromkeys(name for name, _ in wave)]
    names = [n for n in layer.regimes if n in wanted.regimes and n in CHANCE | CERTAIN]
    asks = max(1, len(mine) * len(names))

    def run(entrant: Entrant, names: Sequence[str]) -> None:
        for name in names:
            say(f"{name} at length: {entrant.name}")
            for less, ms in _by_depth(wave, entrant.name).items():
                aim = _aim(wanted.aim, less * (LESS if name in CERTAIN else 1))
                for only, patience in _by_speed(entrant, ms):
                    left = wanted.until - time.monotonic()
                    if left <= 0 or name in entrant.dead:
                        return
                    each = min(patience * aim.seconds, 2 * left / asks / len(only))
                    with layer.clock.spent(f"{name} at length", entrant.name):
                        at_length(layer, entrant, name, record, only, replace(aim, seconds=each))

    def beside(entrant: Entrant) -> None:
        run(entrant, [n for n in names if n not in ALONE])
        if time.monotonic() < wanted.until:
            say(f"every m: {entrant.name}")
            with layer.clock.spent("every m", entrant.name):
                run_every_m(layer, entrant, record, [m for name, m in wave if name == entrant.name])

    with layer.clock.spent("at length, one at a time"):
        for name in (n for n in names if n in ALONE):
            for entrant in mine:
                run(entrant, [name])
    with layer.clock.spent("at length, side by side"):
        list(pool.map(beside, mine) if pool else map(beside, mine))


def _by_depth(wave: Depths, name: str) -> dict[int, list[MRange]]:
    """The ranges in which one backend is to be launched, by how many times less than the aim."""
    found: dict[int, list[MRange]] = {}
    for (who, m), less in wave.items():
        if who == name:
            found.setdefault(less, []).append(m)
    return found


def _by_speed(entrant: Entrant, ms: Sequence[MRange]) -> list[tuple[list[MRange], float]]:
    """The ranges where the kernel is fast enough to reach the aim, and those where it is not, each
    with how many shares of time it may take."""
    fast = [m for m in ms if entrant.median_us.get(m, 0.0) < FAST_US]
    slow = [m for m in ms if m not in fast]
    return [(only, shares) for only, shares in ((fast, FAST_SHARES), (slow, 1.0)) if only]


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
