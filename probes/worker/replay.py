"""One failure again: the same launch, in the same chain and regime, as often as is asked.

Used right after a first failure, to tell steady from intermittent, and by ``fp4tune reproduce``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..data import FAMILIES, WIDTHS
from ..grouped.families import ODD_ROUTING
from ..launch.case import BackendRaised, Case, Launch
from ..launch.error_analysis import examine
from ..launch.outcome import Budget, Outcome
from .experts import OpenExperts
from .session import OpenLayer

_SEPARATE = ("out of bounds", "input modified", "error", "out of memory")
"""Kinds that are seen once for a whole run of a regime: each repeat is a run of its own."""
_ROUNDS = 8
"""Most of such runs."""
_TARGET, _OTHER = 1, 0


def replay(
    layer: OpenLayer, regime: str, bad: Mapping[str, Any], budget: Budget, look: bool = True
) -> dict[str, Any]:
    """Run the launch that `bad` describes again, among those that were around it.

    Returns ``launches`` and ``failures`` of that launch, ``not_exercised`` as a regime has it, and
    with `look` ``alone``: what `anatomy.examine` says of it by itself (not for inexact families of
    a narrow accumulator, nor where it raises). Raises what a regime raises, and ValueError for a
    description that is not of a launch.
    """
    if isinstance(layer, OpenExperts) and bad.get("cut"):
        return layer.cut_again(str(bad["tactic"]))
    cases, launches = recall(layer, bad)
    at = next(i for i, launch in enumerate(launches) if launch.item == _TARGET)
    if bad.get("tile_error") is not None:
        return _by_tile(layer, cases, launches[at], budget)
    kind = str(bad.get("kind"))
    result: dict[str, Any] = {"launches": 0, "failures": 0}
    rounds = min(budget.most, _ROUNDS) if kind in _SEPARATE else 1
    for turn in range(rounds):
        if turn and kind == "input modified":
            cases, launches = recall(layer, bad, afresh=True)
        own = replace(budget, least=1, most=1) if kind in _SEPARATE else budget
        outcomes = layer.run(regime, cases, launches, own)
        _add_outcomes(result, outcomes, kind)
        missed = next((o.not_exercised for o in outcomes if o.not_exercised), None)
        if missed:
            result["not_exercised"] = missed
    # Where in its weight a launch went wrong is told of one weight, not of many experts.
    dense = not isinstance(layer, OpenExperts)
    if look and dense and kind not in ("error", "out of memory", "input modified"):
        # What a launch raises alone says nothing of the values it left elsewhere.
        with suppress(RuntimeError, BackendRaised):
            result["alone"] = examine(layer.backend, cases, launches[at])
    return result


def _add_outcomes(result: dict[str, Any], outcomes: Sequence[Outcome], kind: str) -> None:
    for outcome in outcomes:
        mine = [report for launch, report in outcome.reports if launch.item == _TARGET]
        if _TARGET in outcome.errors:
            result["launches"] += 1
            result["failures"] += 1
        elif kind == "input modified":
            result["launches"] += bool(mine)
            result["failures"] += bool(mine) and outcome.changed_inputs > 0
        else:
            for report in mine:
                result["launches"] += outcome.repeats
                result["failures"] += 0 if report.clean else max(1, report.bad_launches)


def _by_tile(
    layer: OpenLayer, cases: Sequence[Case], launch: Launch, budget: Budget
) -> dict[str, Any]:
    """A family of a narrow accumulator is judged by tiles, one launch at a time."""
    count = max(1, min(budget.most, _ROUNDS))
    missed = sum(layer.misses_tiles(cases, launch) for _ in range(count))
    return {"launches": count, "failures": missed}


def recall(
    layer: OpenLayer, bad: Mapping[str, Any], afresh: bool = False
) -> tuple[list[Case], list[Launch]]:
    """The cases and launches that `bad` describes; the one that failed is item 1, others are 0.

    Data are drawn again from their seeds, unless the layer has them (and not `afresh`). Raises
    ValueError for a description that does not fit the layer.
    """
    data, width = str(bad.get("data")), bad.get("width")
    named = data in FAMILIES or data in ODD_ROUTING
    if (data == "exact" and width not in WIDTHS) or (data != "exact" and not named):
        raise ValueError(f"there is no data {data!r} of width {width!r}")
    try:
        own = [bad["seed"], bad["offset"], bad["m"], bad["tactic"]]
        chain = [list(each) for each in bad.get("chain") or [own]]
        at = int(bad.get("at") or 0)
        chain[at] = own
        wanted = [(int(s), int(o), int(m), str(t)) for s, o, m, t in chain]
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError("it does not say which launch failed") from None
    rows = layer.problem.m
    if any(not (o >= 0 and m >= 0 and o + m <= rows) for _, o, m, _ in wanted):
        raise ValueError(f"it names rows outside the {rows} of its data")
    seeds = list(dict.fromkeys(seed for seed, *_ in wanted))
    draw = None if bad.get("draw") is None else int(bad["draw"])
    cases = [layer.case_of(data, width, seed, draw, afresh) for seed in seeds]
    launches = [
        Launch(seeds.index(seed), offset, m, tactic, _TARGET if i == at else _OTHER)
        for i, (seed, offset, m, tactic) in enumerate(wanted)
    ]
    return cases, launches
