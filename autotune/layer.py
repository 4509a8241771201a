"""One layer's probe: grade every tactic, time the survivors side by side, then try to break them.

A layer is one (format, activation, dtype, n, k). Backends take part as *entrants*. Everything
learnt goes to the recorder as it comes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..cache.rows import BucketKey
from ..probes.data import families
from ..probes.devices import Target
from ..probes.health import health
from ..probes.problem import Problem
from ..probes.regimes import ALONE, REGIMES
from ..probes.seeds import derive
from ..probes.supervisor import WorkerFailed
from .buckets import MRange, ragged, representative
from .levels import Level
from .record import Recorder
from .runner import Runner
from .stats import median
from .verdict import EXACT

QUICK_SAMPLES = 2
"""Samples that decide among one backend's own tactics; the winner is measured again."""
ENOUGH_TO_DROP = 3
FAR = 1.5
"""After three samples a candidate 1.5 times as slow as the best is not sampled further."""
MOST_SPLITS = 5
"""How often a crash while grading is narrowed down by halves before the rest is given up."""

LARGE_M = 1024
"""Ranges above are run at their edges only: one launch there costs as much as dozens of small."""
SPARE_ROWS = 64
"""Rows of the pools beyond the largest m, so that even its launches can be on different rows."""

Item = dict[str, Any]


@dataclass(slots=True)
class Entrant:
    """A backend in this layer: its tactics by m range, and what has been learnt of them."""

    runner: Runner
    tactics: dict[MRange, list[str]]
    reference_line: bool
    dead: dict[str, str]
    """Regimes in which the backend once took its worker down, and how; shared by all layers."""
    width: dict[tuple[MRange, str], int] = field(default_factory=dict)
    faulty: set[tuple[MRange, str]] = field(default_factory=set)
    """Tactics that failed on data no condition excuses; they are beaten by any that did not."""
    winner: dict[MRange, str] = field(default_factory=dict)
    median_us: dict[MRange, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.runner.name


@dataclass(frozen=True, slots=True)
class Layer:
    """What `probe_layer` works on. `problem.m` is the largest m."""

    target: Target
    problem: Problem
    ranges: tuple[MRange, ...]
    level: Level
    seed: int
    memory: int
    cache_bytes: int

    def bucket(self, m: MRange) -> BucketKey:
        p = self.problem
        return BucketKey(p.format, p.activation, p.out_dtype, p.groups, m.lo, m.hi, p.n, p.k)

    def item(self, m: MRange, tactic: str, width: int = 24, tag: object = "") -> Item:
        """A tactic in an m range as the worker takes it, with ragged m's drawn from the seed."""
        rng = random.Random(derive(self.seed, self.problem, m, tag))
        count = self.level.ragged if m.hi <= LARGE_M else 2
        return {"ms": ragged(m, count, rng), "tactic": tactic, "width": width}


def probe_layer(
    layer: Layer,
    entrants: Sequence[Entrant],
    record: Recorder,
    say: Callable[[str], None],
    pool: Executor | None = None,
) -> None:
    """Grade, time and stress every entrant; evidence, findings and times go to `record`.

    With `pool`, entrants are graded at once, and go through most regimes at once: on a GPU most of
    that time is the host's, and a hang of one is waited for while others go on. Timing, and the
    regimes that need it (`ALONE`), have the device to themselves.
    """

    def grade(entrant: Entrant) -> bool:
        if not _open(layer, entrant, record):
            return False
        _grade(layer, entrant, record)
        if not entrant.reference_line:
            _families(layer, entrant, record)
        return True

    say("grading: exact, realistic and extreme data")
    graded = list(pool.map(grade, entrants) if pool else map(grade, entrants))
    opened = [e for e, ok in zip(entrants, graded, strict=True) if ok]
    for entrant in opened:
        _tune(layer, entrant, record, say)
    say("timing side by side")
    _time(layer, [e for e in opened if e.winner], record)
    tried = [e for e in opened if e.winner and not e.reference_line]

    def stress(entrant: Entrant, regimes: Sequence[str]) -> None:
        for regime in regimes:
            say(f"{regime}: {entrant.name}")
            _regime(layer, entrant, regime, record)

    for regime in (name for name in REGIMES if name in ALONE):
        for entrant in tried:
            stress(entrant, [regime])
    together = partial(stress, regimes=[name for name in REGIMES if name not in ALONE])
    list(pool.map(together, tried) if pool else map(together, tried))
    for entrant in opened:
        # A worker that dies now has shown all it had; the next layer starts another.
        with suppress(WorkerFailed):
            entrant.runner.close_layer()


def _open(layer: Layer, entrant: Entrant, record: Recorder) -> bool:
    try:
        pool = layer.problem.at(layer.problem.m + SPARE_ROWS)
        entrant.runner.open(pool, layer.seed, layer.memory)
    except WorkerFailed as failure:
        for m in entrant.tactics:
            _failed(layer, entrant, m, entrant.tactics[m][0], "serial", EXACT, failure, record)
        return False
    return True


def _grade(layer: Layer, entrant: Entrant, record: Recorder) -> None:
    """Serial launches of exact problems for every tactic; the width of those that are right."""
    pairs = [(m, tactic) for m, tactics in entrant.tactics.items() for tactic in tactics]
    splits = [MOST_SPLITS]

    def grade(part: Sequence[tuple[MRange, str]]) -> None:
        items = [layer.item(m, tactic, tag="grade") for m, tactic in part]
        try:
            results = entrant.runner.ask("grade", items=items)
        except WorkerFailed as failure:
            if failure.fatal and len(part) > 1 and splits[0] > 0:
                splits[0] -= 1
                half = len(part) // 2
                grade(part[:half])
                grade(part[half:])
                return
            for m, tactic in part:
                _failed(layer, entrant, m, tactic, "serial", EXACT, failure, record)
            return
        for (m, tactic), result in zip(part, results, strict=True):
            width = result["width"]
            if width is not None:
                entrant.width[m, tactic] = width
            record.result(entrant.name, tactic, layer.bucket(m), "serial", EXACT, result, width)

    grade(pairs)


def _families(layer: Layer, entrant: Entrant, record: Recorder) -> None:
    """Realistic and extreme data, in the serial regime, for every tactic that was graded."""
    pairs = list(entrant.width)
    for family in families(layer.problem) if pairs else ():
        name = family.name
        items = [layer.item(m, t, entrant.width[m, t], name) for m, t in pairs]
        try:
            results = entrant.runner.ask("family", name=name, items=items)
        except WorkerFailed as failure:
            for m, tactic in pairs:
                _failed(layer, entrant, m, tactic, "serial", name, failure, record)
            entrant.faulty.update(pairs)
            continue
        for pair, item, result in zip(pairs, items, results, strict=True):
            status = record.result(
                entrant.name, pair[1], layer.bucket(pair[0]), "serial", name, result, item["width"]
            )
            if status == "failed" and family.condition is None:
                entrant.faulty.add(pair)


def _tune(layer: Layer, entrant: Entrant, record: Recorder, say: Callable[[str], None]) -> None:
    """Pick each m range's fastest tactic among those that came out right."""
    alive = {m: _right(entrant, m) for m in entrant.tactics}
    pairs = [(m, t) for m, ts in alive.items() if len(ts) > 1 and m.hi > 0 for t in ts]
    times: dict[tuple[MRange, str], float] = {}
    if pairs:
        say(f"comparing tactics: {entrant.name}")
        try:
            _open_timing(layer, entrant, pairs)
            every = list(range(len(pairs)))
            samples = [entrant.runner.ask("sample", indices=every) for _ in range(QUICK_SAMPLES)]
            times = {pair: min(s[i] for s in samples) for i, pair in enumerate(pairs)}
            entrant.runner.ask("close_timing")
        except WorkerFailed as failure:
            _died(layer, entrant, "timing", failure, record)
    for m, tactics in alive.items():
        if tactics:
            entrant.winner[m] = min(tactics, key=lambda t: times.get((m, t), float("inf")))
    zero, first = _zero_and_first(alive)
    if zero in entrant.winner and first in entrant.winner:
        # An empty batch has no time of its own: it goes with the smallest real one.
        same = entrant.winner[first]
        if same in alive[zero]:
            entrant.winner[zero] = same


def _right(entrant: Entrant, m: MRange) -> list[str]:
    """Tactics without a fault; where each has one, those that could be graded at least."""
    graded = [t for t in entrant.tactics[m] if (m, t) in entrant.width]
    return [t for t in graded if (m, t) not in entrant.faulty] or graded


def _zero_and_first(ranges: dict[MRange, Any]) -> tuple[MRange | None, MRange | None]:
    ordered = sorted(ranges)
    zero = next((m for m in ordered if m.hi == 0), None)
    first = next((m for m in ordered if m.hi > 0), None)
    return zero, first


def _open_timing(
    layer: Layer, entrant: Entrant, pairs: Sequence[tuple[MRange, str]]
) -> list[float]:
    items = [{"ms": [representative(m)], "tactic": tactic} for m, tactic in pairs]
    return entrant.runner.ask("open_timing", items=items, cache_bytes=layer.cache_bytes)


def _time(layer: Layer, entrants: Sequence[Entrant], record: Recorder) -> None:
    """Sample every entrant's winner in turn, so that drift of clocks hits all alike."""
    host: dict[str, list[float]] = {}
    pairs: dict[str, list[tuple[MRange, str]]] = {}
    for entrant in entrants:
        chosen = [(m, t) for m, t in entrant.winner.items() if m.hi > 0]
        try:
            host[entrant.name] = _open_timing(layer, entrant, chosen)
            pairs[entrant.name] = chosen
        except WorkerFailed as failure:
            _died(layer, entrant, "timing", failure, record)
    samples: dict[tuple[str, MRange], list[float]] = {}
    before = health(layer.target)
    for turn in range(layer.level.samples):
        for m in layer.ranges:
            far = _far_behind(entrants, samples, m) if turn >= ENOUGH_TO_DROP else set()
            for entrant in entrants:
                index = _index(pairs.get(entrant.name, []), m)
                if index is None or entrant.name in far:
                    continue
                try:
                    (us,) = entrant.runner.ask("sample", indices=[index])
                except WorkerFailed as failure:
                    _died(layer, entrant, "timing", failure, record)
                    del pairs[entrant.name]
                    continue
                samples.setdefault((entrant.name, m), []).append(us)
    device = {"before": before, "after": health(layer.target)} if before else {}
    for entrant in entrants:
        if entrant.name not in pairs:
            continue
        for index, (m, tactic) in enumerate(pairs[entrant.name]):
            taken = samples[entrant.name, m]
            entrant.median_us[m] = median(taken)
            record.timing(
                entrant.name, tactic, layer.bucket(m), taken, host[entrant.name][index], device
            )
        try:
            entrant.runner.ask("close_timing")
        except WorkerFailed as failure:
            _died(layer, entrant, "timing", failure, record)


def _far_behind(
    entrants: Sequence[Entrant], samples: dict[tuple[str, MRange], list[float]], m: MRange
) -> set[str]:
    """Entrants so slow in this m range that more samples could not change their place."""
    times = {
        e.name: median(samples[e.name, m])
        for e in entrants
        if (e.name, m) in samples and not e.reference_line
    }
    best = min(times.values(), default=0.0)
    return {name for name, time in times.items() if time > FAR * best}


def _index(pairs: Sequence[tuple[MRange, str]], m: MRange) -> int | None:
    return next((i for i, (other, _) in enumerate(pairs) if other == m), None)


def _winners(layer: Layer, entrant: Entrant, tag: str) -> list[tuple[MRange, str, Item]]:
    return [
        (m, tactic, layer.item(m, tactic, entrant.width[m, tactic], tag))
        for m, tactic in entrant.winner.items()
    ]


def _regime(layer: Layer, entrant: Entrant, name: str, record: Recorder) -> None:
    """One regime over a chain of every bucket's winner."""
    won = _winners(layer, entrant, name)
    if name in entrant.dead:
        why = {"note": f"not run again: {entrant.dead[name]} on an earlier layer"}
        for m, tactic, _ in won:
            record.status(entrant.name, tactic, layer.bucket(m), name, EXACT, "skipped", why)
        return
    level = layer.level
    budget = {"least": level.least, "most": level.most, "seconds": level.seconds}
    silence = entrant.runner.patience.regime
    try:
        result = entrant.runner.ask(
            "regime", silence, name=name, items=[i for _, _, i in won], budget=budget
        )
    except WorkerFailed as failure:
        if failure.fatal:
            entrant.dead[name] = f"{failure.kind} ({failure})"
        for m, tactic, _ in won:
            _failed(layer, entrant, m, tactic, name, EXACT, failure, record)
        return
    broken = [m for (m, _, _), part in zip(won, result["items"], strict=True) if part["bad"]]
    for (m, tactic, item), part in zip(won, result["items"], strict=True):
        if broken and not part["bad"] and name != "serial":
            # They ran interleaved: what corrupted one launch may have spared another by chance.
            why = {"note": f"m={broken[0]} failed in the same chain"}
            record.status(entrant.name, tactic, layer.bucket(m), name, EXACT, "skipped", why)
            continue
        part = {**part, **{key: result[key] for key in ("proof", "not_exercised")}}
        record.result(
            entrant.name,
            tactic,
            layer.bucket(m),
            name,
            EXACT,
            part,
            item["width"],
            result["seconds"] / max(1, len(won)),
        )


def _died(
    layer: Layer, entrant: Entrant, regime: str, failure: WorkerFailed, record: Recorder
) -> None:
    """A worker that failed outside a verdict's regimes: it is told, and gets no time."""
    for m, tactic in entrant.winner.items():
        _failed(layer, entrant, m, tactic, regime, EXACT, failure, record)


def _failed(
    layer: Layer,
    entrant: Entrant,
    m: MRange,
    tactic: str,
    regime: str,
    data: str,
    failure: WorkerFailed,
    record: Recorder,
) -> None:
    record.failure(entrant.name, tactic, layer.bucket(m), regime, data, failure)
