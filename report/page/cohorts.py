"""A fleet's choices with how many nodes agree, and its evidence by cohort at both levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import heatmap
from .fleetrows import Common
from .heatmap import Names
from .markup import Child, details, el, mark, table
from .numbers import count

_MOST = 100


def choices(rows: Sequence[Common], known: Names) -> Markup:
    """Maps of what most nodes chose, and of how many of them did."""
    parts: list[Markup] = []
    by_choice = {id(row.row): row for row in rows}
    for kind, some in heatmap.by_kind(row.row for row in rows).items():
        shares = {c.bucket: _agreement(by_choice[id(c)]) for c in some}
        caption = "Nodes that chose so, of those that chose"
        maps = heatmap.chosen(some, known), heatmap.grid(caption, shares, caption)
        parts += [el("h4", heatmap.kind_text(kind)), heatmap.legend(some, known)]
        parts.append(el("div", maps, class_="side"))
    return Markup("").join(parts)


def _agreement(row: Common) -> Markup:
    share = row.nodes / row.all_nodes
    step = sum(share >= limit for limit in (0.5, 0.75, 0.9, 0.99, 1.0))
    return el("td", f"{row.nodes:,} of {row.all_nodes:,}", class_=f"s{step}")


def evidence(found: Mapping[str, Any]) -> Markup:
    """A folded table for each cohort. The share of nodes and the rate within a node are two things,
    and are never made into one."""
    confidence = f"{100 * found['confidence']:g} %"
    rows = sorted(found["cohorts"], key=lambda c: -sum(e["nodes_failing"] for e in c["evidence"]))
    parts = [
        details(_title(cohort), _table(cohort, confidence), open_=at < 2)
        for at, cohort in enumerate(rows[:_MOST])
    ]
    if len(rows) > _MOST:
        parts.append(el("p", f"and {len(rows) - _MOST} more: fp4tune fleet report --json"))
    return Markup("").join(parts)


def _title(cohort: Mapping[str, Any]) -> Child:
    failing = sum(1 for e in cohort["evidence"] if e["nodes_failing"])
    code = f", code {cohort['code'][:12]}" if cohort["code"] else ""
    said = f" on {cohort['gpu']} ({cohort['arch']}), environment {cohort['fingerprint'][:12]}{code}"
    verdict = (
        mark("unsafe", "✗", f"fails in {count(failing, 'series', 'series')}", seen=True)
        if failing
        else mark("safe", "✓", "no failure", seen=True)
    )
    return [cohort["backend"], el("span", said, class_="soft"), " ", verdict]


def _table(cohort: Mapping[str, Any], confidence: str) -> Markup:
    rows = [
        (
            f"{e['regime']}, {e['data']}",
            _nodes(e),
            _share(e["share"], e["nodes_failing"]),
            _failing(e["rate_within_failing_nodes"]),
            _clean(e["rate_within_clean_nodes"]),
        )
        for e in cohort["evidence"]
    ]
    headings = (
        "regime, data",
        "nodes failing",
        "share of nodes",
        "rate per launch where it fails",
        "and where it does not",
    )
    return table(f"Evidence at two levels, at {confidence}", headings, rows, (1, 2, 3, 4))


def _nodes(e: Mapping[str, Any]) -> Markup:
    said = f"{e['nodes_failing']:,} of {e['nodes']:,}"
    gpus = el("span", f"{e['gpus_failing']:,} of {e['gpus']:,} GPUs", class_="span")
    return el("td", said, gpus, class_="num bad" if e["nodes_failing"] else "num")


def _share(share: Mapping[str, Any], failing: int) -> str:
    if not failing:
        return f"below {share['upper']:.2%}"
    return f"{share['low']:.2%} to {share['high']:.2%}"


def _failing(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return "·"
    return f"{rate['least']:.2g} to {rate['most']:.2g}, median {rate['median']:.2g}"


def _clean(rate: Mapping[str, Any] | None) -> str:
    return "·" if rate is None else f"below {rate['upper']:.2g}"
