"""Sums over two GPUs, as tensor parallelism makes them behind each row-parallel GEMM.

What came out as the choice is run on both GPUs at once, by the workers that have its backend
loaded, with an all-reduce behind each GEMM (`probes.regimes.host.collective`). Both probes say at
each point what they are about to do, and do what both can. The floor goes first: where its own sums
fail, that says something of the ranks' library or of the host, and nothing of any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...cache.rows import Under, Where
from ...probes.problem import Problem
from ...probes.regimes.host.collective import ALONE
from ...probes.seeds import derive
from ...probes.worker.supervisor import WorkerFailed
from ...words import COLLECTIVE
from .. import budget
from ..agreement import Partner
from ..choice.rank import FLOORS
from ..evidence.recorder import Recorder
from ..layer import SPARE_ROWS, Entrant, ProbedLayer
from ..verdict.buckets import MRange

MOST_M = 512
"""Rows of the largest launch: where tensor parallelism waits for sums, batches are small."""
UNDER = Under(COLLECTIVE)
OTHERS = "the rank on the other GPU ended"
WRONG = "wrong"
SEED = 20
"""Both sides draw the same data, whatever else their probes draw."""

Layers = Sequence[tuple[ProbedLayer, Sequence[Entrant]]]
Key = tuple[bool, str, Problem]
"""Whether it is no floor, the backend, and the layer: in this order they are run."""
Items = tuple[tuple[MRange, str, int], ...]
"""Ranges of m with a tactic and the width that it was graded with."""
Wanted = dict[Key, tuple[ProbedLayer, Entrant, Items]]


def collective(
    layers: Layers,
    right: Callable[[Where], bool],
    record: Recorder,
    say: Callable[[str], None],
    partner: Partner | None,
) -> None:
    """Add up what the fastest right backends compute, until those that are left are known to.

    Without a partner the regime is not applicable. One whose sums are wrong makes way for the next.
    """
    while True:
        mine = _untried(layers, right, record, partner is None)
        if partner is None:
            _of_every_item(mine.values(), "not applicable", ALONE, record)
            return
        theirs = partner.swap({key: part[2] for key, part in mine.items()}, lambda: say(COLLECTIVE))
        both = _wanted_by_both(mine, theirs or {})
        if not both:
            return
        for number, (key, items) in enumerate(both.items()):
            layer, entrant, _ = mine[key]
            say(f"sums over two GPUs: {entrant.name}")
            with layer.clock.spent(COLLECTIVE, entrant.name):
                well, outcomes = _together(layer, entrant, items, partner)
            if not well and not key[0]:
                rest = [mine[each] for each in list(both)[number:]]
                why = f"not run: the sums of {entrant.name}, the floor, failed"
                _of_every_item(rest, "skipped", why, record)
                return
            with record.together():
                for (m, tactic, width), outcome in zip(items, outcomes, strict=True):
                    where = layer.where(entrant, m, tactic)
                    if isinstance(outcome, str):
                        record.status(where, UNDER, "skipped", {"note": outcome})
                    elif isinstance(outcome, WorkerFailed):
                        record.failure(where, UNDER, outcome)
                    else:
                        record.result(where, UNDER, outcome, width)


def _untried(
    layers: Layers, right: Callable[[Where], bool], record: Recorder, alone: bool
) -> Wanted:
    """The fastest right backend of each bucket, and the floor, as far as they were not tried; what
    was not applicable to one GPU is tried on two."""
    tried = {"passed", "failed", "skipped", *(["not applicable"] if alone else [])}
    found: dict[Key, list[tuple[MRange, str, int]]] = {}
    who: dict[Key, tuple[ProbedLayer, Entrant]] = {}
    for layer, entrants in layers:
        if layer.problem.groups > 1 or (layer.time and layer.time.over):
            continue
        by_name = {e.name: e for e in entrants if e.winner and not e.reference_line}
        times = {name: entrant.median_us for name, entrant in by_name.items()}
        for m in (m for m in layer.ranges if 0 < m.hi <= MOST_M):
            order = [
                name
                for name in budget.order(times, m)
                if m in by_name[name].winner
                and right(layer.where(by_name[name], m, by_name[name].winner[m]))
            ]
            for name in dict.fromkeys([*order[:1], *(n for n in order if n in FLOORS)]):
                entrant = by_name[name]
                tactic = entrant.winner[m]
                facts = record.facts(layer.where(entrant, m, tactic))
                if any(f.regime == COLLECTIVE and f.status in tried for f in facts):
                    continue
                if alone and entrant.known:
                    continue  # an earlier run has said so, or ended before: nothing is to be added
                key = (name not in FLOORS, name, layer.problem)
                found.setdefault(key, []).append((m, tactic, entrant.width[m, tactic]))
                who[key] = layer, entrant
    return {key: (*who[key], tuple(items)) for key, items in found.items()}


def _wanted_by_both(mine: Wanted, theirs: Mapping[Key, Items]) -> dict[Key, Items]:
    """What both want, in one order for both."""
    both = {}
    for key in sorted(mine.keys() & theirs.keys(), key=lambda key: (*key[:2], repr(key[2]))):
        items = tuple(item for item in mine[key][2] if item in theirs[key])
        if items:
            both[key] = items
    return both


def _together(
    layer: ProbedLayer, entrant: Entrant, items: Items, partner: Partner
) -> tuple[bool, list[WorkerFailed | str | dict[str, Any]]]:
    """This GPU's part of one chain: whether all was well on both, and of each item how it failed,
    why nothing can be said of it, or what came out."""
    steps = [(edge, tactic) for m, tactic, _ in items for edge in dict.fromkeys((m.lo, m.hi))]
    rows = max(edge for edge, _ in steps) + SPARE_ROWS
    asked: dict[str, Any] = {
        "problem": asdict(layer.problem.at(rows)),
        "width": min(width for _, _, width in items),
        "seed": derive(SEED, "collective", layer.problem),
        "ms": [edge for edge, _ in steps],
        "tactics": [tactic for _, tactic in steps],
        "rank": partner.rank,
        "meet": partner.place(),
    }
    failure: WorkerFailed | None = None
    part: dict[str, Any] = {}
    try:
        part = entrant.runner.ask("collective", entrant.runner.patience.run, **asked)
    except WorkerFailed as failed:
        failure = failed
    mine = failure.kind if failure else WRONG if part["bad"] else ""
    theirs = partner.swap(mine, lambda: None)
    if theirs not in ("", WRONG) and (not failure or (mine == "hang" and theirs != "hang")):
        # Who waits for one that died hangs, and is not to be blamed for that.
        return False, [OTHERS] * len(items)
    if failure:
        return False, [failure] * len(items)

    def of(m: MRange, tactic: str) -> dict[str, Any]:
        bad = [b for b in part["bad"] if b["tactic"] == tactic and m.lo <= b["m"] <= m.hi]
        return {"launches": part["launches"], "problems": 1, "bad": bad}

    return mine == theirs == "", [of(m, tactic) for m, tactic, _ in items]


def _of_every_item(
    parts: Iterable[tuple[ProbedLayer, Entrant, Items]], status: str, note: str, record: Recorder
) -> None:
    """One status for every item of these."""
    for layer, entrant, items in parts:
        for m, tactic, _ in items:
            record.status(layer.where(entrant, m, tactic), UNDER, status, {"note": note})
