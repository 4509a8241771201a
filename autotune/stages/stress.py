"""Regimes: launch conditions that try to break what was graded, one chain of all m at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from ...cache.rows import Under, Where
from ...probes.regimes import ALONE, COSTLY, HARDER, SAME_START
from ...probes.worker.supervisor import WorkerFailed
from .. import budget, chains
from ..budget import OVER, REPEATS, SLOWER, lacking, windows
from ..evidence.recorder import Recorder
from ..layer import Entrant, Item, ProbedLayer, not_tried
from ..retest import try_again
from ..verdict.buckets import MRange

Part = Mapping[str, Collection[MRange] | None]
"""Who goes through the regimes, by name, and in which m ranges; None for all."""


@dataclass(frozen=True, slots=True)
class _Tried:
    """A bucket's winner in one turn of a regime."""

    m: MRange
    where: Where
    item: Item


@dataclass(frozen=True, slots=True)
class _Turn:
    """One launch of a regime's chain: which turn it is, how often it is repeated, and on how many
    windows of rows for each m."""

    number: int
    budget: dict[str, Any]
    windows: int = 1


def stress(
    layer: ProbedLayer,
    entrants: Sequence[Entrant],
    record: Recorder,
    say: Callable[[str], None],
    pool: Executor | None = None,
) -> None:
    """Every regime of the level, for the winners of these entrants; the fastest first where time is
    limited.

    With `pool`, entrants go through most regimes at once: on a GPU most of that time is the host's,
    and a hang of one is waited for while others go on. The regimes in `ALONE` have the device to
    themselves.
    """
    tried = [e for e in entrants if e.winner and not e.reference_line]

    def run(part: Part) -> None:
        mine = [e for e in tried if e.name in part and not e.known]
        for step, alone in (("regimes, one at a time", True), ("regimes, side by side", False)):
            names = [n for n in layer.regimes if (n in ALONE) == alone]
            with layer.clock.spent(step):
                if alone:
                    for name in names:
                        for entrant in mine:
                            _regimes(layer, entrant, [name], part[entrant.name], record, say)
                    continue

                def together(entrant: Entrant, names: Sequence[str] = names) -> None:
                    _regimes(layer, entrant, names, part[entrant.name], record, say)

                list(pool.map(together, mine) if pool else map(together, mine))

    if layer.time is None:
        run({entrant.name: None for entrant in tried})
    else:
        _from_the_fastest(layer, layer.time, tried, run, record)


def _regimes(
    layer: ProbedLayer,
    entrant: Entrant,
    names: Sequence[str],
    only: Collection[MRange] | None,
    record: Recorder,
    say: Callable[[str], None],
) -> None:
    for name in names:
        say(f"{name}: {entrant.name}")
        with layer.clock.spent(name, entrant.name):
            run_regime(layer, entrant, name, record, only)


def _from_the_fastest(
    layer: ProbedLayer,
    limit: budget.TimeBudget,
    tried: Sequence[Entrant],
    run: Callable[[Part], None],
    record: Recorder,
) -> None:
    """Run waves until two candidates of every m range are proven; the rest is told `not tried`.

    Ends with the time, too: what was not tried then says so.
    """
    by_name = {entrant.name: entrant for entrant in tried}
    times = {entrant.name: entrant.median_us for entrant in tried}
    orders = {
        m: [name for name in budget.order(times, m) if m in by_name[name].winner]
        for m in layer.ranges
    }
    if layer.agreement:
        scope = (layer.target.name, layer.problem)
        orders = {m: layer.agreement.order(scope, m, own) for m, own in orders.items()}
    done: dict[MRange, list[str]] = {m: [] for m in layer.ranges}

    def where(name: str, m: MRange) -> Where:
        return layer.where(by_name[name], m, by_name[name].winner[m])

    def proven(name: str, m: MRange) -> bool:
        return limit.proven(where(name, m))

    while not limit.over and (wave := budget.next_wave(orders, done, proven)):
        run(wave)
        for name, ranges in wave.items():
            for m in ranges:
                done[m].append(name)
    for m, names in orders.items():
        enough = sum(proven(name, m) for name in done[m]) >= budget.ENOUGH
        for name in names:
            if name not in done[m] and not by_name[name].known:
                not_tried(where(name, m), SLOWER if enough else OVER, record)


def run_regime(
    layer: ProbedLayer,
    entrant: Entrant,
    name: str,
    record: Recorder,
    only: Collection[MRange] | None = None,
) -> None:
    """One regime over a chain of every bucket's winner, or of those in `only`."""
    won = list(_winners(layer, entrant, name, only))
    if layer.time and layer.time.over:
        for each in won:
            not_tried(each.where, OVER, record)
        return
    bounded = layer.launches if layer.launches and name in layer.launches.regimes else None
    left = _needless(layer, entrant, name, won)
    if left is not None:
        status, reasons = left
        for each, why in zip(won, reasons, strict=True):
            record.status(each.where, Under(name), status, {"note": why})
        if bounded:
            bounded.part()
        return
    level = layer.level
    first = _Turn(0, {"least": level.least, "most": level.most, "seconds": level.seconds})
    passed = _run(layer, entrant, name, won, first, record)
    if bounded and passed:
        _until_bounded(layer, entrant, name, bounded, record, only)
    elif bounded:
        bounded.part()  # for those that come after


def _winners(
    layer: ProbedLayer, entrant: Entrant, tag: str, only: Collection[MRange] | None
) -> Iterator[_Tried]:
    edges = tag.split(" ")[0] in COSTLY and layer.launches is None
    for m, tactic in entrant.winner.items():
        if only is None or m in only:
            item = layer.item(m, tactic, entrant.width[m, tactic], tag, edges)
            yield _Tried(m, layer.where(entrant, m, tactic), item)


def _needless(
    layer: ProbedLayer, entrant: Entrant, name: str, won: Sequence[_Tried]
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
        reasons = [entrant.exempt.get((same, each.m, each.where.tactic)) for each in won]
        if all(reasons):
            return "not applicable", [str(why) for why in reasons]
    return None


def _until_bounded(
    layer: ProbedLayer,
    entrant: Entrant,
    name: str,
    spend: budget.LaunchBudget,
    record: Recorder,
    only: Collection[MRange] | None,
) -> None:
    """More turns of a regime, on fresh problems, until every kernel's failure rate is bounded.

    A kernel that failed is left: no number of launches makes it good. Ends with its part of the
    budget.
    """
    start, seconds = time.monotonic(), spend.part()
    number = 0
    while time.monotonic() - start < seconds:
        number += 1
        won = list(_winners(layer, entrant, f"{name} {number}", only))
        short = lacking(spend, record.exact, [each.where for each in won], name)
        won = [each for each, more in zip(won, short, strict=True) if more]
        if not won:
            break
        count = windows(sum(len(each.item["ms"]) for each in won))
        turn = _Turn(number, {"least": REPEATS, "most": REPEATS, "seconds": 0.0}, count)
        if not _run(layer, entrant, name, won, turn, record):
            break
    spend.spend(time.monotonic() - start)


def _run(
    layer: ProbedLayer,
    entrant: Entrant,
    name: str,
    won: Sequence[_Tried],
    turn: _Turn,
    record: Recorder,
) -> bool:
    """One chain of these items in one regime; whether another may follow: all of it passed."""
    patience = entrant.runner.patience
    # A chain's second GEMM may load code that nothing before it did.
    silence = patience.run if name == chains.REGIME else patience.regime
    under = Under(name)
    asked = {
        "name": name,
        "items": [each.item for each in won],
        "budget": turn.budget,
        "turn": turn.number,
    }
    try:
        result = entrant.runner.ask("regime", silence, windows=turn.windows, **asked)
    except WorkerFailed as failure:
        if failure.fatal:
            entrant.dead[name] = f"{failure.kind} ({failure})"
        for each in won:
            record.failure(each.where, under, failure, layer.asked("regime", **asked))
        return False
    try_again(entrant, [each.where for each in won], under, result["items"], record)
    passed = True
    broken = [each.m for each, part in zip(won, result["items"], strict=True) if part["bad"]]
    seconds = result["seconds"] / max(1, len(won))
    for each, part in zip(won, result["items"], strict=True):
        if broken and not part["bad"] and name != "serial":
            # They ran interleaved: what corrupted one launch may have spared another by chance.
            why = {"note": f"m={broken[0]} failed in the same chain"}
            record.status(each.where, under, "skipped", why)
            continue
        part = {**part, **{key: result[key] for key in ("proof", "not_exercised")}}
        status = record.result(each.where, under, part, each.item["width"], seconds)
        passed = passed and status == "passed"
        if status == "not applicable" and part.get("exempt"):
            entrant.exempt[name, each.m, each.where.tactic] = part["exempt"]
    return passed
