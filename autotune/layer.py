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
from ..probes.regimes import ALONE, COSTLY, HARDER, REGIMES, SAME_START
from ..probes.regimes.mlp_layers import second_shape
from ..probes.seeds import derive
from ..probes.supervisor import WorkerFailed
from . import census, chains
from .agreement import Agreement
from .buckets import MRange, ragged, representative
from .clock import Clock
from .levels import Level
from .record import Recorder
from .retest import failed, retest
from .runner import Runner
from .soak import REPEATS, Purse, lacking, open_share, windows
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
    exempt: dict[tuple[str, MRange, str], str] = field(default_factory=dict)
    """By regime, m range and tactic: why it cannot have the fault that is looked for."""
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
    clock: Clock = field(default_factory=Clock)
    begins_mlp: bool = True
    """Whether `mlp-chain` is run with this layer as its first."""
    agreement: Agreement | None = None
    """Shared with the probes of other GPUs; None where this is the only one."""
    purse: Purse | None = None
    """What may be spent on bounding failure rates; None where no rate was asked for."""

    def bucket(self, m: MRange) -> BucketKey:
        p = self.problem
        return BucketKey(p.format, p.activation, p.out_dtype, p.groups, m.lo, m.hi, p.n, p.k)

    def item(
        self, m: MRange, tactic: str, width: int = 24, tag: object = "", edges: bool = False
    ) -> Item:
        """A tactic in an m range as the worker takes it, with ragged m's drawn from the seed, or
        the range's edges only."""
        rng = random.Random(derive(self.seed, self.problem, m, tag))
        count = self.level.ragged if m.hi <= LARGE_M and not edges else 2
        ms = ragged(m, count, rng)
        if tag == chains.REGIME:
            # Each costs two GEMMs and a reference of their own.
            ms = [rng.choice(ms)]
        return {"ms": ms, "tactic": tactic, "width": width}


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

    spent = layer.clock.spent

    def grade(entrant: Entrant) -> bool:
        with spent("open", entrant.name):
            if not _open(layer, entrant, record):
                return False
        with spent("grade", entrant.name):
            _grade(layer, entrant, record)
        if not entrant.reference_line:
            with spent("families", entrant.name):
                _families(layer, entrant, record)
            with spent("census", entrant.name):
                census.graded(layer, entrant, record)
        return True

    say("grading: exact, realistic and extreme data")
    with spent("grading"):
        graded = list(pool.map(grade, entrants) if pool else map(grade, entrants))
    opened = [e for e, ok in zip(entrants, graded, strict=True) if ok]
    for entrant in opened:
        with spent("tactics", entrant.name):
            _tune(layer, entrant, record, say)
    say("timing side by side")
    with spent("timing"):
        _time(layer, [e for e in opened if e.winner], record)
    tried = [e for e in opened if e.winner and not e.reference_line]

    def stress(entrant: Entrant, regimes: Sequence[str]) -> None:
        for regime in (name for name in regimes if name not in layer.level.without):
            say(f"{regime}: {entrant.name}")
            with spent(regime, entrant.name):
                _regime(layer, entrant, regime, record)

    with spent("regimes, one at a time"):
        for regime in (name for name in REGIMES if name in ALONE):
            for entrant in tried:
                stress(entrant, [regime])
    together = partial(stress, regimes=[name for name in REGIMES if name not in ALONE])
    with spent("regimes, side by side"):
        list(pool.map(together, tried) if pool else map(together, tried))
    for entrant in opened:
        # A worker that dies now has shown all it had; the next layer starts another.
        with suppress(WorkerFailed):
            entrant.runner.close_layer()


def _open(layer: Layer, entrant: Entrant, record: Recorder) -> bool:
    try:
        pool = layer.problem.at(layer.problem.m + SPARE_ROWS)
        behind = second_shape(layer.problem) if layer.begins_mlp else None
        entrant.runner.open(pool, layer.seed, layer.memory, behind)
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
            asked = _asked(layer, "grade", items=items)
            for m, tactic in part:
                _failed(layer, entrant, m, tactic, "serial", EXACT, failure, record, asked)
            return
        _retest(layer, entrant, part, "serial", EXACT, results, record)
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
            asked = _asked(layer, "family", name=name, items=items)
            for m, tactic in pairs:
                _failed(layer, entrant, m, tactic, "serial", name, failure, record, asked)
            entrant.faulty.update(pairs)
            continue
        _retest(layer, entrant, pairs, "serial", name, results, record)
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
    if layer.agreement:
        scope = (layer.target.name, layer.problem, entrant.name)
        entrant.winner = layer.agreement.settle(scope, entrant.winner, alive)


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
            if not entrant.reference_line:
                census.timed(layer, entrant, pairs[entrant.name], record)
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
    edges = tag.split(" ")[0] in COSTLY and layer.purse is None
    return [
        (m, tactic, layer.item(m, tactic, entrant.width[m, tactic], tag, edges))
        for m, tactic in entrant.winner.items()
    ]


def _regime(layer: Layer, entrant: Entrant, name: str, record: Recorder) -> None:
    """One regime over a chain of every bucket's winner."""
    won = _winners(layer, entrant, name)
    left = _needless(layer, entrant, name, won)
    if left is not None:
        status, reasons = left
        for (m, tactic, _), why in zip(won, reasons, strict=True):
            note = {"note": why}
            record.status(entrant.name, tactic, layer.bucket(m), name, EXACT, status, note)
        if layer.purse and name in layer.purse.regimes:
            layer.purse.share()
        return
    level = layer.level
    budget = {"least": level.least, "most": level.most, "seconds": level.seconds}
    passed = _turn(layer, entrant, name, won, budget, record)
    if layer.purse and name in layer.purse.regimes:
        if passed:
            _soak(layer, entrant, name, layer.purse, record)
        else:
            layer.purse.share()  # for those that come after


def _needless(
    layer: Layer, entrant: Entrant, name: str, won: Sequence[tuple[MRange, str, Item]]
) -> tuple[str, list[str]] | None:
    """Where the regime need not be run: the status to record, and the reason for each item."""
    for deadly in (name, HARDER.get(name)):
        if deadly in entrant.dead:
            why = f"not run: {entrant.dead[deadly]} in {deadly} before"
            return "skipped", [why] * len(won)
    if name == chains.REGIME and not layer.begins_mlp:
        return "not applicable", [chains.ELSEWHERE] * len(won)
    same = SAME_START.get(name)
    if same is not None and won:
        reasons = [entrant.exempt.get((same, m, tactic)) for m, tactic, _ in won]
        if all(reasons):
            return "not applicable", [str(why) for why in reasons]
    return None


def _soak(layer: Layer, entrant: Entrant, name: str, purse: Purse, record: Recorder) -> None:
    """More turns of a regime, on fresh problems, until every kernel's failure rate is bounded.

    A kernel that failed is left: no number of launches makes it good. Ends with the purse's share.
    """
    share = open_share(purse)
    turn = 0
    budget = {"least": REPEATS, "most": REPEATS, "seconds": 0.0}
    while not share.empty:
        turn += 1
        won = _winners(layer, entrant, f"{name} {turn}")
        buckets = [(tactic, layer.bucket(m)) for m, tactic, _ in won]
        short = lacking(purse, record.exact, entrant.name, buckets, name)
        won = [each for each, more in zip(won, short, strict=True) if more]
        if not won:
            break
        count = windows(sum(len(item["ms"]) for _, _, item in won))
        if not _turn(layer, entrant, name, won, budget, record, turn, count):
            break
    share.close()


def _turn(
    layer: Layer,
    entrant: Entrant,
    name: str,
    won: Sequence[tuple[MRange, str, Item]],
    budget: dict[str, Any],
    record: Recorder,
    turn: int = 0,
    count: int = 1,
) -> bool:
    """One chain of these items in one regime; whether another may follow: all of it passed."""
    patience = entrant.runner.patience
    # A chain's second GEMM may load code that nothing before it did.
    silence = patience.run if name == chains.REGIME else patience.regime
    items = [i for _, _, i in won]
    try:
        result = entrant.runner.ask(
            "regime", silence, name=name, items=items, budget=budget, turn=turn, windows=count
        )
    except WorkerFailed as failure:
        if failure.fatal:
            entrant.dead[name] = f"{failure.kind} ({failure})"
        asked = _asked(layer, "regime", name=name, items=items, budget=budget, turn=turn)
        for m, tactic, _ in won:
            _failed(layer, entrant, m, tactic, name, EXACT, failure, record, asked)
        return False
    pairs = [(m, tactic) for m, tactic, _ in won]
    _retest(layer, entrant, pairs, name, EXACT, result["items"], record)
    passed = True
    broken = [m for (m, _, _), part in zip(won, result["items"], strict=True) if part["bad"]]
    for (m, tactic, item), part in zip(won, result["items"], strict=True):
        if broken and not part["bad"] and name != "serial":
            # They ran interleaved: what corrupted one launch may have spared another by chance.
            why = {"note": f"m={broken[0]} failed in the same chain"}
            record.status(entrant.name, tactic, layer.bucket(m), name, EXACT, "skipped", why)
            continue
        part = {**part, **{key: result[key] for key in ("proof", "not_exercised")}}
        status = record.result(
            entrant.name,
            tactic,
            layer.bucket(m),
            name,
            EXACT,
            part,
            item["width"],
            result["seconds"] / max(1, len(won)),
        )
        passed = passed and status == "passed"
        if status == "not applicable" and part.get("exempt"):
            entrant.exempt[name, m, tactic] = part["exempt"]
    return passed


def _retest(
    layer: Layer,
    entrant: Entrant,
    pairs: Sequence[tuple[MRange, str]],
    regime: str,
    data: str,
    results: Sequence[dict[str, Any]],
    record: Recorder,
) -> None:
    """Try the failures among `results` again; a worker lost over it is a finding of its own."""

    def died(failure: WorkerFailed) -> None:
        entrant.dead.setdefault(regime, f"{failure.kind} ({failure})")
        m, tactic = next(p for p, r in zip(pairs, results, strict=True) if failed(r))
        _failed(layer, entrant, m, tactic, regime, data, failure, record)

    retest(entrant.runner, regime, results, died)


def _asked(layer: Layer, do: str, **arguments: Any) -> dict[str, Any]:
    """What a worker was asked, with the layer that was open."""
    rows = layer.problem.m + SPARE_ROWS
    return {"do": do, "seed": layer.seed, "rows": rows, **arguments}


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
    asked: dict[str, Any] | None = None,
) -> None:
    record.failure(entrant.name, tactic, layer.bucket(m), regime, data, failure, asked)
