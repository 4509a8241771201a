"""What outcomes say about one item, in plain dictionaries, ready to be sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..check import tilemap
from ..check.sweep import SlotReport
from .case import Case, Launch
from .outcome import Outcome

MOST_BAD = 3
"""Failures described in full per item, and per stage of it; all are counted."""

BEFORE, AFTER = 8, 7
"""Launches of the chain around a failing one that are kept with it."""

Result = dict[str, Any]


def summarise(item: int, outcomes: Sequence[Outcome], cases: Sequence[Case]) -> Result:
    """What `outcomes` say about one item: checked launches, bad ones, and the first few.

    Different problems are left for `OpenLayer` to count, which knows those of other runs. Where an
    input changed, ``example`` is one of the launches, with those around it.
    """
    result: Result = {"launches": 0, "problems": 0, "bad_launches": 0, "bad_problems": 0, "bad": []}
    right: dict[int, bool] = {}
    for outcome in outcomes:
        chain = [launch for launch, _ in outcome.reports]
        if item in outcome.errors:
            result["error"] = outcome.errors[item]
        if item in outcome.exempt:
            result["exempt"] = outcome.exempt[item]
        for at, (launch, report) in enumerate(outcome.reports):
            if launch.item != item:
                continue
            result["launches"] += outcome.repeats
            right[launch.m] = right.get(launch.m, True) and report.clean
            if outcome.changed_inputs and "example" not in result:
                near = around(chain, at, cases)
                result["example"] = {**launched(launch, cases), **near}
            if not report.clean:
                # A guard zone is read once, at the end: at least one launch wrote there.
                result["bad_launches"] += max(1, report.bad_launches)
                alike = [bad for bad in result["bad"] if bad.get("stage", "") == report.stage]
                if len(alike) < MOST_BAD:
                    # A stage, or another layer behind, has an output of a shape of its own.
                    m, n = report.shape or (launch.m, cases[launch.case].problem.n)
                    found = {**launched(launch, cases, report.draw), **describe(report)}
                    found["map"] = tilemap.tiles_of(m, n, report.tiles).pack()
                    found.update(around(chain, at, cases))
                    result["bad"].append(found)
    failed = [*result["bad"]]
    if "error" in result:
        result["error"] = dict(result["error"])
        failed.append(result["error"])
    for found in failed:
        found["right_at"] = sorted(m for m, clean in right.items() if clean and m)
    return result


def describe(report: SlotReport) -> Result:
    """A failed slot in plain data, with the kind that says most about it."""
    if report.unwritten:
        kind = "unwritten"
    elif report.not_finite:
        kind = "not finite"
    elif report.wrong:
        kind = "wrong"
    elif report.early:
        kind = "written early"
    else:
        kind = "out of bounds"
    found: Result = {
        "kind": kind,
        "wrong": report.wrong,
        "unwritten": report.unwritten,
        "not_finite": report.not_finite,
        "guard": report.guard,
        "tiles": [list(tile) for tile in report.tiles[:64]],
    }
    if report.first:
        found["launch"] = report.first
    if report.early:
        found["early"] = report.early
    if report.stage:
        found["stage"] = report.stage
    if report.witness:
        row, col, value, low, high = report.witness
        found["worst"] = {"row": row, "col": col, "found": repr(value), "expected": [low, high]}
    return found


def launched(launch: Launch, cases: Sequence[Case], draw: int = 0) -> Result:
    """What it takes to make this launch again; `draw` is how often its rows were drawn anew."""
    chosen = cases[launch.case]
    return {
        "m": launch.m,
        "offset": launch.offset,
        "seed": chosen.operands.seed,
        "data": chosen.operands.family,
        **({} if chosen.operands.rows is None else {"draw": draw}),
        "width": chosen.operands.width,
        "rows": chosen.problem.m,
        "tactic": launch.tactic,
    }


def around(launches: Sequence[Launch], at: int, cases: Sequence[Case]) -> dict[str, Any]:
    """The launches of a chain around the one at `at`, as plain data.

    ``chain`` holds (seed of the data, first row, m, tactic) each, ``at`` the place of the one.
    """
    first = max(0, at - BEFORE)
    part = launches[first : at + AFTER + 1]
    chain = [[cases[x.case].operands.seed, x.offset, x.m, x.tactic] for x in part]
    return {"chain": chain, "at": at - first}
