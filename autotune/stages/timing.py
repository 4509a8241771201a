"""Timing a layer: a race among the tactics of each backend, then one among the backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...cache.measured import NOISE
from ...engines import names
from ...machine.health import health
from ...probes.worker.supervisor import WorkerFailed
from .. import census, steps
from ..clock_stability import Watch, undecided, unsteady
from ..evidence.recorder import Recorder
from ..layer import LARGE_M, Entrant, ProbedLayer, died
from ..race import LEAST, Race, run_races
from ..verdict.buckets import MRange, representatives
from ..verdict.statistics import median, median_interval

UNEVEN = 1.2
"""A kernel that takes so many times as long at some m of a bucket as at its largest is named."""
TACTIC_NOISE = NOISE / 2
"""Tactics within half a percent of their backend's fastest count as equal, and the first in the
backend's own order is taken."""


Pair = tuple[MRange, str]
"""An m range, and a tactic in it."""


def time_layer(
    layer: ProbedLayer,
    entrants: Sequence[Entrant],
    record: Recorder,
    say: Callable[[str], None],
    pool: Executor | None = None,
) -> None:
    """Find every entrant's fastest right tactic of each m range, then race the entrants.

    With `pool`, what is to be timed is prepared in all workers at once; nothing else is. Of routed
    experts, of which each worker looks how slow they are, in one after the other.
    """
    spent = layer.clock.spent
    pool = pool if layer.problem.groups == 1 else None
    with spent("tactics"):
        _tune(layer, [e for e in entrants if not (e.known or e.compared)], record, say, pool)
    if layer.timed:
        for entrant in entrants:
            entrant.median_us.update(_known_times(layer, entrant, record))
        return
    say("timing side by side")
    with spent("timing"):
        _time_side_by_side(layer, [e for e in entrants if e.winner], record, pool)


@dataclass(frozen=True, slots=True)
class _Contest:
    """The right tactics of an entrant by m range, and a race in each range that has several."""

    entrant: Entrant
    alive: Mapping[MRange, Sequence[str]]
    races: dict[MRange, Race]

    @property
    def pairs(self) -> list[Pair]:
        """What is to be timed."""
        return [(m, tactic) for m in self.races for tactic in self.alive[m]]


def _contest(layer: ProbedLayer, entrant: Entrant) -> _Contest:
    alive = {m: _runnable(layer, entrant, m) for m in entrant.tactics}
    races = {
        # The winner is measured again, so nobody needs an interval of his own here.
        m: Race(tuple(tactics), layer.level.samples, TACTIC_NOISE, least=LEAST)
        for m, tactics in alive.items()
        if len(tactics) > 1 and m.hi > 0
    }
    return _Contest(entrant, alive, races)


def _tune(
    layer: ProbedLayer,
    entrants: Sequence[Entrant],
    record: Recorder,
    say: Callable[[str], None],
    pool: Executor | None,
) -> None:
    """Pick each entrant's fastest tactic of each m range among those that came out right."""
    contests = [_contest(layer, entrant) for entrant in entrants]
    several = [each for each in contests if each.races]
    if several:
        say(f"comparing tactics: {', '.join(each.entrant.name for each in several)}")
    wanted = [(each.entrant, each.pairs) for each in several]
    opened = _open_timing(layer, wanted, _edges_of, pool)
    for contest in several:
        entrant, pairs = contest.entrant, contest.pairs
        places = {pair: (entrant.name, index) for index, pair in enumerate(pairs)}
        try:
            failed = opened[entrant.name]
            if isinstance(failed, WorkerFailed):
                raise failed
            run_races(contest.races, places, _samples_of(entrant))
            entrant.runner.ask("close_timing")
        except WorkerFailed as failure:
            contest.races.clear()
            died(layer, entrant, "timing", failure, record)
    for contest in contests:
        _winners_of_contest(layer, contest, record)


def _samples_of(entrant: Entrant) -> Callable[[str, list[int]], list[float]]:
    def ask(_: str, indices: list[int]) -> list[float]:
        found: list[float] = entrant.runner.ask("sample", indices=indices)
        return found

    return ask


def _winners_of_contest(layer: ProbedLayer, contest: _Contest, record: Recorder) -> None:
    """The winners of a contest that is over."""
    entrant, alive, races = contest.entrant, contest.alive, contest.races
    for m, tactics in alive.items():
        if tactics:
            entrant.winner[m] = races[m].winner if m in races else tactics[0]
    zero, first = _zero_and_first(alive)
    if zero in entrant.winner and first in entrant.winner:
        # An empty batch has no time of its own: it goes with the smallest real one.
        same = entrant.winner[first]
        if same in alive[zero]:
            entrant.winner[zero] = same
    if layer.agreement:
        scope = (layer.target.name, layer.problem, entrant.name)
        entrant.winner = layer.agreement.settle(scope, entrant.winner, alive)
    with layer.step(entrant, steps.TACTICS, list(entrant.winner.items()), record):
        entrant.compared = True


def _runnable(layer: ProbedLayer, entrant: Entrant, m: MRange) -> list[str]:
    """The right tactics of a range; of routed experts those that the engine could come to run,
    where choices are made for one and there are any."""
    right = entrant.right_tactics(m)
    if layer.engine is None:
        return right
    return [t for t in right if names.runs_tactic(entrant.name, t)] or right


def _known_times(layer: ProbedLayer, entrant: Entrant, record: Recorder) -> dict[MRange, float]:
    """The times of its winners that are on record, in microseconds."""
    places = {m: layer.where(entrant, m, tactic) for m, tactic in entrant.winner.items()}
    return {m: record.timings[p].median_us for m, p in places.items() if p in record.timings}


def _edges_of(m: MRange) -> list[int]:
    """The m that tactics are compared at: who wins at both edges is taken for the whole."""
    return sorted({m.lo, m.hi}) if m.hi <= LARGE_M else [m.hi]


def _zero_and_first(ranges: Iterable[MRange]) -> tuple[MRange | None, MRange | None]:
    ordered = sorted(ranges)
    zero = next((m for m in ordered if m.hi == 0), None)
    first = next((m for m in ordered if m.hi > 0), None)
    return zero, first


def _open_timing(
    layer: ProbedLayer,
    wanted: Sequence[tuple[Entrant, Sequence[Pair]]],
    ms_of: Callable[[MRange], Sequence[int]],
    pool: Executor | None,
) -> dict[str, list[float | None] | WorkerFailed]:
    """Have workers prepare these, at a few m of each range: by backend, the host microseconds of a
    call of each (beside the others, with `pool`), or how its worker failed."""

    def open_(each: tuple[Entrant, Sequence[Pair]]) -> list[float | None] | WorkerFailed:
        entrant, pairs = each
        items = [{"ms": list(ms_of(m)), "tactic": tactic} for m, tactic in pairs]
        try:
            found: list[float | None] = entrant.runner.ask(
                "open_timing", items=items, cache_bytes=layer.cache_bytes
            )
        except WorkerFailed as failure:
            return failure
        return found

    names = [entrant.name for entrant, _ in wanted]
    return dict(zip(names, (pool.map if pool else map)(open_, wanted), strict=True))


def _time_side_by_side(
    layer: ProbedLayer, entrants: Sequence[Entrant], record: Recorder, pool: Executor | None
) -> None:
    """Race every entrant's winners against those of the others, in each m range."""
    host: dict[Pair, float | None] = {}
    pairs: dict[str, list[Pair]] = {}
    wanted = [(e, [(m, t) for m, t in e.winner.items() if m.hi > 0]) for e in entrants]
    opened = _open_timing(layer, wanted, representatives, pool)
    for entrant, chosen in wanted:
        spans = opened[entrant.name]
        if isinstance(spans, WorkerFailed):
            died(layer, entrant, "timing", spans, record)
            continue
        pairs[entrant.name] = chosen
        host.update({(m, entrant.name): us for (m, _), us in zip(chosen, spans, strict=True)})
    by_name = {entrant.name: entrant for entrant in entrants}
    lines = frozenset(entrant.name for entrant in entrants if entrant.reference_line)
    places = {
        (m, name): (name, index)
        for name, mine in pairs.items()
        for index, (m, _) in enumerate(mine)
    }
    races = {
        m: Race(tuple(n for n in pairs if (m, n) in places), layer.level.samples, lines=lines)
        for m in layer.ranges
        if any((m, name) in places for name in pairs)
    }

    def ask(name: str, indices: list[int]) -> list[float] | None:
        try:
            found: list[float] = by_name[name].runner.ask("sample", indices=indices)
        except WorkerFailed as failure:
            died(layer, by_name[name], "timing", failure, record)
            del pairs[name]
            return None
        return found

    # The first round brings the clocks up; what they do before says nothing.
    watch = Watch(partial(health, layer.target))
    run_races(races, places, ask, watch.look)
    watch.look(now=True)
    within: dict[str, list[list[tuple[int, float]]]] = {}
    laws: dict[str, dict[MRange, dict[str, Any]]] = {}
    for name, mine in pairs.items():
        within[name] = [[] for _ in mine]
        laws[name] = {}
        try:
            if not by_name[name].reference_line:
                census.timed(layer, by_name[name], mine, record)
            laws[name] = _by_law(layer, by_name[name], mine)
            within[name] = by_name[name].runner.ask("close_timing")
        except WorkerFailed as failure:
            died(layer, by_name[name], "timing", failure, record)
    field: dict[str, Any] = {"field": sorted(by_name), "samples": layer.level.samples}
    with ExitStack() as stack:
        # All of it or nothing: times hold beside those they were taken with.
        for entrant in entrants:
            chosen = list(entrant.winner.items())
            stack.enter_context(layer.step(entrant, steps.TIMING, chosen, record, **field))
        for name, mine in pairs.items():
            for (m, tactic), by_m in zip(mine, within[name], strict=True):
                taken = races[m].levelled(name)
                by_name[name].median_us[m] = median(taken)
                where = layer.where(by_name[name], m, tactic)
                seen = _circumstances(races[m], name, watch, by_m)
                detail = {**seen, **laws[name].get(m, {})}
                record.timing(where, taken, host[m, name], detail)


def _by_law(
    layer: ProbedLayer, entrant: Entrant, pairs: Sequence[tuple[MRange, str]]
) -> dict[MRange, dict[str, Any]]:
    """Of routed experts, the time of each range under each routing law by itself, in microseconds:
    its median, with an interval. Raises WorkerFailed."""
    if layer.problem.groups == 1:
        return {}
    found = entrant.runner.ask("times_by_law")
    return {
        m: {"laws": {law: _spread(samples) for law, samples in mine.items() if samples}}
        for (m, _), mine in zip(pairs, found, strict=True)
    }


def _spread(samples: Sequence[float]) -> dict[str, float]:
    low, high = median_interval(samples)
    named = {"median_us": median(samples), "lo_us": low, "hi_us": high}
    return {name: round(us, 3) for name, us in named.items()}


def _uneven(by_m: Sequence[tuple[int, float]]) -> str | None:
    """That a kernel is much slower at some m of a bucket than at its largest, or None."""
    if not by_m:
        return None
    m, us = max(by_m, key=lambda each: each[1])
    last, usual = by_m[-1]
    if us <= UNEVEN * usual:
        return None
    return f"at m={m} it takes {us / usual:.1f} times as long as at m={last}"


def _circumstances(
    race: Race, name: str, watch: Watch, by_m: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """What the device did while `name` was timed, what its time is at each m, and what it should
    not rest on."""
    detail: dict[str, Any] = dict(watch.device)
    detail["by_m"] = [[m, round(us, 3)] for m, us in by_m]
    notes = [unsteady(watch.seen), _uneven(by_m)]
    if race.open_question and race.margin is not None and name in race.alive:
        notes.append(undecided(len(race.levelled(name)), race.margin))
    if said := [note for note in notes if note]:
        detail["note"] = "; ".join(said)
    return detail
