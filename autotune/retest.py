"""After a first failure: the same launch again, to tell a steady fault from an intermittent one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..cache.rows import Under, Where
from ..probes.worker.supervisor import WorkerFailed
from .evidence.recorder import Recorder
from .layer import Entrant
from .runner import Runner
from .verdict.statistics import interval

LAUNCHES = {"least": 3, "most": 32, "seconds": 0.5}
"""How often a failure is tried again: a chain of 16 launches, for about half a second."""
LOOK = {"least": 1, "most": 1, "seconds": 0.0}
MOST_LOOKS = 8
"""Failing items beyond the first and the last of which one launch is taken apart."""
STEADY, INTERMITTENT, GONE = "steady", "intermittent", "not seen again"

Result = dict[str, Any]
"""What a worker reported of one item."""


def kind(launches: int, failures: int) -> str:
    """What `failures` in `launches` of the same launch make of it."""
    return GONE if not failures else STEADY if failures == launches else INTERMITTENT


def summary(launches: int, failures: int) -> dict[str, Any]:
    """A retest as a finding keeps it: ``rate`` is a Clopper-Pearson interval at 95 %.

    The failure that led to the retest is not among these launches: it was picked for failing.
    """
    low, high = interval(min(failures, launches), launches) if launches else (0.0, 1.0)
    return {
        "launches": launches,
        "failures": failures,
        "kind": kind(launches, failures),
        "rate": [round(low, 6), round(high, 6)],
    }


def retest(
    runner: Runner,
    regime: str,
    results: Sequence[Result],
    died: Callable[[WorkerFailed], None],
) -> None:
    """Try the first and the last failing item of `results` again, and note there what came of it.

    ``retest`` and ``alone`` are added to the first failure of these, ``alone`` to those of some
    items between; `died` is called where the worker was lost over it, and nothing more is tried.
    """
    failing = [bad for result in results if (bad := _failure(result))]
    often = failing[:1] + failing[1:][-1:]
    for bad in (*often, *failing[1:-1][:MOST_LOOKS]):
        try:
            # In the time an ordinary command has: data may be drawn and prepared anew.
            budget = LAUNCHES if bad in often else LOOK
            again = runner.ask("replay", name=regime, bad=bad, budget=budget)
        except WorkerFailed as failure:
            bad["retest"] = {"launches": 0, "failures": 0, "kind": f"not done: {failure}"}
            if failure.fatal:
                died(failure)
                return
            continue
        if bad in often:
            bad["retest"] = summary(again["launches"], again["failures"])
        if again.get("alone"):
            bad["alone"] = again["alone"]


def try_again(
    entrant: Entrant,
    places: Sequence[Where],
    under: Under,
    results: Sequence[Result],
    record: Recorder,
) -> None:
    """Try the failures among `results`, one for each of `places`, again; a worker lost over it is
    a finding of its own."""

    def lost(failure: WorkerFailed) -> None:
        entrant.dead.setdefault(under.regime, f"{failure.kind} ({failure})")
        first = next(where for where, r in zip(places, results, strict=True) if failed(r))
        record.failure(first, under, failure)

    retest(entrant.runner_of(under.regime), under.regime, results, lost)


def failed(result: Result) -> bool:
    """Whether anything of this item went wrong."""
    return bool(result.get("bad") or result.get("error") or result.get("changed_inputs"))


def _failure(result: Result) -> Result | None:
    """What of an item to try again, made part of it; None where nothing failed."""
    if result.get("bad"):
        return result["bad"][0]
    error = result.get("error")
    if error:
        return error if "seed" in error and error.get("kind") != "out of memory" else None
    if result.get("changed_inputs") and result.get("example"):
        made: Result = result.setdefault(
            "modified", {**result["example"], "kind": "input modified"}
        )
        return made
    return None
