"""The page of a fleet, from its store and what `fleet.report` says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...fleet import promote, report
from ...fleet.warehouse import Warehouse
from ..numbers import count
from ..wording import range_text, scope_text
from . import environments, findings, fleetrows, heatmap, render, times
from .cohorts import cohorts
from .fleetrows import CommonChoice
from .heatmap import DASH, BackendNames, HeatCell, HeatGrid, Maps, ScopeMaps
from .render import PageSection

MOST = 200
"""Rows of a table that are shown."""
_STEPS = 20
_LOGIN = re.compile(r"//[^/@]*@")
"""What a URL may hold that is nobody's business."""
_SPREAD = "between GPUs: the median, below it the middle half"


@dataclass(frozen=True, slots=True)
class FleetRows:
    """Rows of a table: those shown, and a caption that says where that is not all."""

    caption: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Suspects:
    builds: FleetRows
    gpus: FleetRows
    undetermined: FleetRows


@dataclass(frozen=True, slots=True)
class Generations:
    """What a fleet's generations changed: a sentence, the rows (where, before, now), and the steps
    taken, newest first."""

    sentence: str
    caption: str
    rows: tuple[tuple[str, str, str], ...]
    steps: Sequence[Mapping[str, Any]]


def document(store: str, found: Mapping[str, Any] | None = None) -> str:
    """The page of the fleet store `store`; `found` is its `fleet.report.report`, if made already.

    Raises Refused for what is no fleet store.
    """
    found = found or report.report(store)
    with Warehouse(store) as warehouse:
        choices = fleetrows.choices(warehouse)
        timed = fleetrows.times(warehouse)
        verdicts = fleetrows.verdicts(warehouse)
        kinds = fleetrows.findings(warehouse)
        held = environments.environments(fleetrows.environments(warehouse))
        happened = promote.events(warehouse.place)
    maps, drawn = [], []
    for scope, mine in fleetrows.by_scope(choices).items():
        candidates = [c for c in timed if (c.arch, c.gpu) == scope[:2]]
        rows = [c.row for c in mine]
        known = heatmap.names(rows, candidates)
        maps.append(_maps(scope, mine, known))
        drawn.append(times.scope_times(scope, rows, candidates, known, _SPREAD))
    slow, apart = found["slow_gpus"], found["disagreements"]
    return render.page(
        f"FP4 GEMM choices of {count(found['nodes'], 'node')}",
        f"{_LOGIN.sub('//', found['store'])}: {count(found['bundles'], 'bundle')}, "
        f"digest {found['digest'][:12]}",
        _fleet_glance(found),
        [
            PageSection("suspects", "Suspects", _suspects(found)),
            PageSection("choices", "Choices", maps),
            PageSection("generations", "What changed", _generations(happened)),
            PageSection("cohorts", "Cohorts", cohorts(found)),
            PageSection("times", "Times", drawn),
            PageSection("node-verdicts", "Verdicts", verdicts and _verdicts(verdicts)),
            PageSection(
                "slow", "Slow GPUs", slow and _captioned_first("Slower than their like", slow)
            ),
            PageSection("disagreements", "Disagreements", apart and _choices_apart(apart)),
            PageSection("findings", "Findings", findings.section(kinds)),
            PageSection("environment", "Environment", held and (held, ())),
        ],
    )


def _maps(
    scope: tuple[str, str, str], rows: Sequence[CommonChoice], known: BackendNames
) -> ScopeMaps:
    """Maps of what most nodes chose, and of how many of them did."""
    by_choice = {id(row.row): row for row in rows}
    kinds = []
    for kind, some in heatmap.by_kind(row.row for row in rows).items():
        shares = {c.bucket: _agreement(by_choice[id(c)]) for c in some}
        agreed: HeatGrid = heatmap.grid("Nodes that chose so, of those that chose", shares)
        grids = heatmap.chosen(some, known), agreed
        kinds.append(Maps(kind, heatmap.legend(some, known), grids))
    return ScopeMaps(scope_text(*scope), tuple(kinds))


def _agreement(row: CommonChoice) -> HeatCell:
    share = row.nodes / row.all_nodes
    step = sum(share >= limit for limit in (0.5, 0.75, 0.9, 0.99, 1.0))
    return HeatCell(f"s{step}", text=f"{row.nodes:,} of {row.all_nodes:,}")


def _fleet_glance(found: Mapping[str, Any]) -> list[tuple[str, object]]:
    named = (
        ("Nodes", "nodes"),
        ("Cohorts", "cohorts"),
        ("Suspect builds", "suspect_builds"),
        ("Suspect GPUs", "suspect_gpus"),
        ("Undetermined", "undetermined"),
        ("Slow GPUs", "slow_gpus"),
    )

    def number(value: Any) -> str:
        return f"{value if isinstance(value, int) else len(value):,}"

    return [(title, number(found[name])) for title, name in named]


def _captioned_first(caption: str, rows: Sequence[Mapping[str, Any]]) -> FleetRows:
    if len(rows) > MOST:
        caption = f"{caption} (the first {MOST} of {len(rows):,})"
    return FleetRows(caption, rows[:MOST])


def _suspects(found: Mapping[str, Any]) -> Suspects:
    return Suspects(
        _captioned_first("Builds that fail on all GPUs alike", found["suspect_builds"]),
        _captioned_first("GPUs that fail by themselves", found["suspect_gpus"]),
        _captioned_first(
            "Undetermined: neither the GPU nor the build is clear", found["undetermined"]
        ),
    )


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> FleetRows:
    return _captioned_first("Verdicts of all runs: on how many nodes and in how many buckets", rows)


def _choices_apart(rows: Sequence[Mapping[str, Any]]) -> FleetRows:
    told = [{**row, "m": range_text(row["m_lo"], row["m_hi"], DASH)} for row in rows]
    return _captioned_first("Nodes with the same environments that chose differently", told)


def _generations(happened: Sequence[Mapping[str, Any]]) -> Generations:
    steps = [e for e in happened if "number" in e]
    log = steps[-_STEPS:][::-1]
    if not happened:
        return Generations("No generation of choices has been made yet.", "", (), ())
    made = [e for e in steps if "choices" in e]
    if len(made) < 2:
        alone = "There is one generation only, so nothing to compare with."
        return Generations(alone, "", (), log)
    old, new = made[-2], made[-1]
    before, after = fleetrows.said(old["choices"]), fleetrows.said(new["choices"])
    changed = [
        (place, before.get(place, "nothing"), after.get(place, "nothing"))
        for place in dict.fromkeys([*after, *before])
        if before.get(place) != after.get(place)
    ]
    title = f"Generation {old['number']} to {new['number']}"
    if not changed:
        return Generations(f"{title}: the same choices.", "", (), log)
    sentence = f"{title}: {count(len(changed), 'choice')} changed."
    caption = title if len(changed) <= MOST else f"{title} (the first {MOST} of {len(changed):,})"
    return Generations(sentence, caption, tuple(changed[:MOST]), log)
