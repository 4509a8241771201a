"""Timing a layer: a race among the tactics of each backend, then one among the backends.

Workers are asked for several samples in one message. Of the m ranges that are still open `AT_ONCE`
are sampled together: each worker in turn samples all its candidates there, and every second round
goes backwards, so that candidates of one bucket are milliseconds apart and none is always behind
the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ...machine.health import health
from ...probes.worker.supervisor import WorkerFailed
from ..choice.rank import NOISE
from ..entrants import Entrant, Layer, died
from ..evidence.recorder import Recorder
from ..verdict.buckets import MRange, representative
from ..verdict.stats import median
from . import census
from .clock_stability import Watch, undecided, unsteady
from .race import LEAST, Race

TACTIC_NOISE = NOISE / 2
"""Tactics within half a percent of their backend's fastest count as equal, and the first in the
backend's own order is taken."""
AT_ONCE = 4

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


def tune(layer: Layer, entrant: Entrant, record: Recorder, say: Callable[[str], None]) -> None:
    """Pick each m range's fastest tactic among those that came out right."""
    alive = {m: right_tactics(entrant, m) for m in entrant.tactics}
    pairs = [(m, t) for m, ts in alive.items() if len(ts) > 1 and m.hi > 0 for t in ts]
    races = {
        # The winner is measured again, so nobody needs an interval of his own here.
        m: Race(tuple(alive[m]), layer.level.samples, TACTIC_NOISE, least=LEAST)
        for m in dict.fromkeys(m for m, _ in pairs)
    }
    if pairs:
        say(f"comparing tactics: {entrant.name}")
        try:
            open_timing(layer, entrant, pairs)
            places = {pair: (entrant.name, index) for index, pair in enumerate(pairs)}
            run_races(races, places, lambda _, which: entrant.runner.ask("sample", indices=which))
            entrant.runner.ask("close_timing")
        except WorkerFailed as failure:
            races = {}
            died(layer, entrant, "timing", failure, record)
    for m, tactics in alive.items():
        if tactics:
            entrant.winner[m] = fastest_tactic(races[m], tactics) if m in races else tactics[0]
    zero, first = _zero_and_first(alive)
    if zero in entrant.winner and first in entrant.winner:
        # An empty batch has no time of its own: it goes with the smallest real one.
        same = entrant.winner[first]
        if same in alive[zero]:
            entrant.winner[zero] = same
    if layer.agreement:
        scope = (layer.target.name, layer.problem, entrant.name)
        entrant.winner = layer.agreement.settle(scope, entrant.winner, alive)


def fastest_tactic(race: Race, tactics: Sequence[str]) -> str:
    """The winner of a race that is over: of those left within its band, the first of `tactics`."""
    times = {name: median(race.samples[name]) for name in race.alive}
    best = min(times.values())
    return next(t for t in tactics if t in times and times[t] <= best * (1 + race.band))


def right_tactics(entrant: Entrant, m: MRange) -> list[str]:
    """Tactics without a fault; where each has one, those that could be graded at least."""
    graded = [t for t in entrant.tactics[m] if (m, t) in entrant.width]
    return [t for t in graded if (m, t) not in entrant.faulty] or graded


def _zero_and_first(ranges: Iterable[MRange]) -> tuple[MRange | None, MRange | None]:
    ordered = sorted(ranges)
    zero = next((m for m in ordered if m.hi == 0), None)
    first = next((m for m in ordered if m.hi > 0), None)
    return zero, first


def open_timing(
    layer: Layer, entrant: Entrant, pairs: Sequence[tuple[MRange, str]]
) -> list[float | None]:
    """Have the worker prepare these; the host microseconds of a call of each."""
    items = [{"ms": [representative(m)], "tactic": tactic} for m, tactic in pairs]
    found: list[float | None] = entrant.runner.ask(
        "open_timing", items=items, cache_bytes=layer.cache_bytes
    )
    return found


def time_side_by_side(layer: Layer, entrants: Sequence[Entrant], record: Recorder) -> None:
    """Race every entrant's winners against those of the others, in each m range."""
    host: dict[tuple[MRange, str], float | None] = {}
    pairs: dict[str, list[tuple[MRange, str]]] = {}
    for entrant in entrants:
        chosen = [(m, t) for m, t in entrant.winner.items() if m.hi > 0]
        try:
            spans = open_timing(layer, entrant, chosen)
        except WorkerFailed as failure:
            died(layer, entrant, "timing", failure, record)
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
    for name, mine in pairs.items():
        for m, tactic in mine:
            _record(layer, by_name[name], m, tactic, races[m], host[m, name], watch, record)
        try:
            if not by_name[name].reference_line:
                census.timed(layer, by_name[name], mine, record)
            by_name[name].runner.ask("close_timing")
        except WorkerFailed as failure:
            died(layer, by_name[name], "timing", failure, record)


def _record(
    layer: Layer,
    entrant: Entrant,
    m: MRange,
    tactic: str,
    race: Race,
    host_us: float | None,
    watch: Watch,
    record: Recorder,
) -> None:
    taken = race.levelled(entrant.name)
    entrant.median_us[m] = median(taken)
    detail: dict[str, Any] = dict(watch.device)
    notes = [unsteady(watch.seen)]
    if race.open_question and race.margin is not None and entrant.name in race.alive:
        notes.append(undecided(len(taken), race.margin))
    if said := [note for note in notes if note]:
        detail["note"] = "; ".join(said)
    record.timing(entrant.name, tactic, layer.bucket(m), taken, host_us, detail)
