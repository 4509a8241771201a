"""Regimes: launch conditions that try to break what was graded, one chain of all m at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ...probes.regimes import COSTLY, HARDER, SAME_START
from ...probes.worker.supervisor import WorkerFailed
from .. import chains
from ..allowance import OVER
from ..entrants import Entrant, Item, Layer, asked, failed, not_tried, try_again
from ..evidence.recorder import Recorder
from ..soak import REPEATS, Purse, lacking, open_share, windows
from ..verdict.buckets import MRange
from ..verdict.rules import EXACT


def _winners(
    layer: Layer, entrant: Entrant, tag: str, only: Collection[MRange] | None
) -> list[tuple[MRange, str, Item]]:
    edges = tag.split(" ")[0] in COSTLY and layer.purse is None
    return [
        (m, tactic, layer.item(m, tactic, entrant.width[m, tactic], tag, edges))
        for m, tactic in entrant.winner.items()
        if only is None or m in only
    ]


def run_regime(
    layer: Layer,
    entrant: Entrant,
    name: str,
    record: Recorder,
    only: Collection[MRange] | None = None,
) -> None:
    """One regime over a chain of every bucket's winner, or of those in `only`."""
    won = _winners(layer, entrant, name, only)
    if layer.allowance and layer.allowance.over:
        for m, tactic, _ in won:
            not_tried(layer, entrant, m, tactic, OVER, record)
        return
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
            _soak(layer, entrant, name, layer.purse, record, only)
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


def _soak(
    layer: Layer,
    entrant: Entrant,
    name: str,
    purse: Purse,
    record: Recorder,
    only: Collection[MRange] | None,
) -> None:
    """More turns of a regime, on fresh problems, until every kernel's failure rate is bounded.

    A kernel that failed is left: no number of launches makes it good. Ends with the purse's share.
    """
    share = open_share(purse)
    turn = 0
    budget = {"least": REPEATS, "most": REPEATS, "seconds": 0.0}
    while not share.empty:
        turn += 1
        won = _winners(layer, entrant, f"{name} {turn}", only)
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
        question = asked(layer, "regime", name=name, items=items, budget=budget, turn=turn)
        for m, tactic, _ in won:
            failed(layer, entrant, m, tactic, name, EXACT, failure, record, question)
        return False
    pairs = [(m, tactic) for m, tactic, _ in won]
    try_again(layer, entrant, pairs, name, EXACT, result["items"], record)
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
