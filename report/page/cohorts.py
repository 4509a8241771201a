"""A fleet's evidence by cohort, at both levels.

The share of nodes and the rate within a node are two things, and are never made into one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MOST = 100


@dataclass(frozen=True, slots=True)
class CohortRow:
    """One regime and kind of data: both levels, in words."""

    where: str
    nodes: str
    gpus: str
    failing: bool
    share: str
    rate_failing: str
    rate_clean: str


@dataclass(frozen=True, slots=True)
class CohortTable:
    """One cohort. `failing` is how many of its series fail."""

    backend: str
    where: str
    failing: int
    rows: tuple[CohortRow, ...]


@dataclass(frozen=True, slots=True)
class Cohorts:
    confidence: str
    tables: tuple[CohortTable, ...]
    more: int


def cohorts(found: Mapping[str, Any]) -> Cohorts | None:
    """From what `fleet.report.report` found; None where there is no evidence."""
    rows = sorted(found["cohorts"], key=lambda c: -sum(e["nodes_failing"] for e in c["evidence"]))
    if not rows:
        return None
    confidence = f"{100 * found['confidence']:g} %"
    return Cohorts(confidence, tuple(map(_cohort_table, rows[:_MOST])), max(0, len(rows) - _MOST))


def _cohort_table(cohort: Mapping[str, Any]) -> CohortTable:
    code = f", code {cohort['code'][:12]}" if cohort["code"] else ""
    where = f"on {cohort['gpu']} ({cohort['arch']}), environment {cohort['fingerprint'][:12]}{code}"
    failing = sum(1 for e in cohort["evidence"] if e["nodes_failing"])
    return CohortTable(
        cohort["backend"], where, failing, tuple(map(_cohort_row, cohort["evidence"]))
    )


def _cohort_row(e: Mapping[str, Any]) -> CohortRow:
    failing, clean = e["rate_within_failing_nodes"], e["rate_within_clean_nodes"]
    share = e["share"]
    return CohortRow(
        f"{e['regime']}, {e['data']}",
        f"{e['nodes_failing']:,} of {e['nodes']:,}",
        f"{e['gpus_failing']:,} of {e['gpus']:,} GPUs",
        bool(e["nodes_failing"]),
        f"{share['low']:.2%} to {share['high']:.2%}"
        if e["nodes_failing"]
        else f"below {share['upper']:.2%}",
        "·"
        if failing is None
        else f"{failing['least']:.2g} to {failing['most']:.2g}, median {failing['median']:.2g}",
        "·" if clean is None else f"below {clean['upper']:.2g}",
    )
