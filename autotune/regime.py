"""One regime over a chain of a backend's winners, and what it recorded of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..cache.rows import Under, Where
from ..probes.launch.item import LaunchAim
from ..probes.regimes import COSTLY, HARDER, NOT_DENSE, SAME_START, SHARED_EXPERT
from ..probes.worker.supervisor import WorkerFailed
from ..words import EVERY_M
from . import budget, chains, steps
from .budget import ENOUGH, OVER
from .evidence.recorder import Recorder
from .layer import Entrant, Item, ProbedLayer, not_tried
from .retest import try_again
from .verdict.buckets import MRange

MANY_MS = 8
"""Different m of a bucket where many launches are to be made."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be proven of a layer, and by when.

    `right` says of a tactic in a bucket whether its verdict, as far as known, is safe; `also` are
    backends of which a little is wanted wherever they come. `until` is of `time.monotonic`; `least`
    are seconds for launches at length that there are even after that. `enough` are the proven ones
    of a bucket after which slower ones are left.
    """

    aim: LaunchAim
    regimes: tuple[str, ...]
    right: Callable[[Where], bool]
    also: frozenset[str]
    until: float
    least: float = 0.0
    enough: int = ENOUGH


@dataclass(frozen=True, slots=True)
class Tried:
    """A bucket's winner in one run of a regime."""

    m: MRange
    where: Where
    item: Item

    @property
    def place(self) -> steps.Item:
        return self.m, self.where.tactic


def for_a_model(layer: ProbedLayer, entrants: Sequence[Entrant], wanted: Wanted) -> Wanted:
    """`wanted`, for routed experts with the backend that is the fastest over all ranges, too:
    engines take one for a whole model, and it has to be proven where others are faster."""
    if layer.problem.groups == 1:
        return wanted
    tried = {e.name: e.median_us for e in entrants if layer.is_named(e.name)}
    best = budget.best_of_all(tried, [m for m in layer.ranges if m.hi])
    return replace(wanted, also=wanted.also | {best}) if best else wanted


def briefly(
    layer: ProbedLayer,
    entrant: Entrant,
    name: str,
    record: Recorder,
    only: Collection[MRange] | None = None,
) -> None:
    """A regime for as long as the level says, over every bucket's winner or those in `only`."""
    step = steps.regime(name)
    won = _unfinished_of(entrant, step, _winners(layer, entrant, name, only, name in COSTLY))
    if not won:
        return
    if layer.time and layer.time.over:
        for each in won:
            not_tried(each.where, OVER, record)
        return
    left = _needless(layer, entrant, name, won)
    if left is not None:
        status, reasons = left
        with layer.step(entrant, step, [each.place for each in won], record):
            for each, why in zip(won, reasons, strict=True):
                record.status(each.where, Under(name), status, {"note": why})
        return
    level = layer.level
    budget = {
        "least": level.least,
        "most": level.most,
        "seconds": level.seconds,
        "long": level.long,
    }
    _run_chain(layer, entrant, step, won, {"name": name, "budget": budget}, record)


def passed_briefly(
    layer: ProbedLayer, entrant: Entrant, name: str, m: MRange, record: Recorder
) -> bool:
    """Whether the winner of this range was run in the regime, and all of it passed."""
    if m not in entrant.winner:
        return False
    facts = record.facts(layer.where(entrant, m, entrant.winner[m]))
    return {f.status for f in facts if f.regime == name} == {"passed"}


def at_length(
    layer: ProbedLayer,
    entrant: Entrant,
    name: str,
    record: Recorder,
    only: Collection[MRange],
    aim: LaunchAim,
) -> bool:
    """The same towards an aim, where it was run before and passed; whether it passes still.

    Nothing is recorded of a regime that does not apply, or that did not pass: more launches would
    not change that.
    """
    won = [
        each
        for each in _winners(layer, entrant, f"{name} at length", only, name == chains.REGIME)
        if passed_briefly(layer, entrant, name, each.m, record)
    ]
    step = steps.at_length(name)
    won = _unfinished_of(entrant, step, won, aim.launches)
    if not won:
        return True
    budget = {"least": 1, "most": 1, "seconds": 0.0}
    how = {"name": name, "budget": budget, "aim": asdict(aim)}
    return _run_chain(layer, entrant, step, won, how, record)


def run_every_m(
    layer: ProbedLayer,
    entrant: Entrant,
    record: Recorder,
    only: Collection[MRange],
    seconds: float,
) -> bool:
    """Every m of these ranges once, by their winners, or as many as `seconds` reach; whether all
    of these passed."""
    won = [
        Tried(
            m,
            layer.where(entrant, m, tactic),
            {
                "ms": list(range(m.lo, m.hi + 1)),
                "tactic": tactic,
                "width": entrant.width[m, tactic],
            },
        )
        for m, tactic in entrant.winner.items()
        if m in only
    ]
    step = steps.regime(EVERY_M)
    won = _unfinished_of(entrant, step, won)
    how = {"name": EVERY_M, "budget": {"least": 1, "most": 1, "seconds": seconds}}
    return _run_chain(layer, entrant, step, won, how, record) if won else True


def _unfinished_of(
    entrant: Entrant, step: str, won: Sequence[Tried], launches: int = 0
) -> list[Tried]:
    """Those of which the step was not finished, with so many launches, by a run that was killed."""
    left = entrant.left(step, [each.place for each in won], launches)
    return [each for each in won if each.place in left]


def _winners(
    layer: ProbedLayer,
    entrant: Entrant,
    tag: str,
    only: Collection[MRange] | None,
    edges: bool,
) -> list[Tried]:
    many = MANY_MS if tag.endswith("at length") else 0
    return [
        Tried(
            m,
            layer.where(entrant, m, tactic),
            layer.item(m, tactic, entrant.width[m, tactic], tag, edges, many),
        )
        for m, tactic in entrant.winner.items()
        if only is None or m in only
    ]


def _needless(
    layer: ProbedLayer, entrant: Entrant, name: str, won: Sequence[Tried]
) -> tuple[str, list[str]] | None:
    """Where the regime need not be run: the status to record, and the reason for each item."""
    dense = layer.problem.groups == 1
    # First of all: what does not apply is no gap in the evidence of one that died in another.
    if name == chains.REGIME and dense and not layer.begins_mlp:
        return "not applicable", [chains.ELSEWHERE] * len(won)
    if name == SHARED_EXPERT and dense:
        return "not applicable", [NOT_DENSE] * len(won)
    for deadly in (name, HARDER.get(name)):
        if deadly in entrant.dead:
            why = f"not run: {entrant.dead[deadly]} in {deadly} before"
            return "skipped", [why] * len(won)
    same = SAME_START.get(name)
    if same is not None and won:
        reasons = [entrant.exempt.get((same, each.m, each.where.tactic)) for each in won]
        if all(reasons):
            return "not applicable", [str(why) for why in reasons]
    return None


def _run_chain(
    layer: ProbedLayer,
    entrant: Entrant,
    step: str,
    won: Sequence[Tried],
    how: dict[str, Any],
    record: Recorder,
) -> bool:
    """One chain of these items in one regime, which is a step; whether all of it passed."""
    name, runner = how["name"], entrant.runner_of(how["name"])
    under = Under(name)
    asked = {"items": [each.item for each in won], **how}
    places, launches = [each.place for each in won], how.get("aim", {}).get("launches", 0)
    try:
        result = runner.ask("regime", **asked)
    except WorkerFailed as failure:
        if failure.fatal:
            entrant.dead[name] = f"{failure.kind} ({failure})"
        with layer.step(entrant, step, places, record, launches):
            for each in won:
                record.failure(each.where, under, failure, layer.asked("regime", **asked))
        return False
    try_again(entrant, [each.where for each in won], under, result["items"], record)
    passed = True
    broken = [each.m for each, part in zip(won, result["items"], strict=True) if part["bad"]]
    seconds = result["seconds"] / max(1, len(won))
    with layer.step(entrant, step, places, record, launches):
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
