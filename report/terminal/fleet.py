"""A fleet's report, in lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MOST = 50
"""Rows of each section; the document has all."""


def fleet_lines(found: Mapping[str, Any]) -> list[str]:
    """What `fleet.report.report` found, in lines."""
    out = [f"{found['bundles']} bundles of {found['nodes']} nodes"]
    for cohort in found["cohorts"]:
        code = f", code {cohort['code'][:12]}" if cohort["code"] else ""
        out.append("")
        out.append(
            f"{cohort['gpu']} ({cohort['arch']}), {cohort['backend']}, environment "
            f"{cohort['fingerprint'][:12]}{code}"
        )
        failing = [e for e in cohort["evidence"] if e["nodes_failing"]]
        clean = [e for e in cohort["evidence"] if not e["nodes_failing"]]
        for e in failing:
            rate = e["rate_within_failing_nodes"]
            out.append(
                f"  {e['regime']} / {e['data']}: {e['nodes_failing']} of {e['nodes']} nodes fail "
                f"({e['share']['low']:.2%} to {e['share']['high']:.2%}); in those "
                f"{rate['least']:.2g} to {rate['most']:.2g} of launches, median "
                f"{rate['median']:.2g}"
            )
        if clean:
            worst = max(clean, key=lambda e: e["share"]["upper"])
            out.append(
                f"  {len(clean)} others: 0 of {worst['nodes']} nodes fail, so below "
                f"{worst['share']['upper']:.2g} of nodes; a node's launches bound its own rate "
                f"below {max(e['rate_within_clean_nodes']['upper'] for e in clean):.2g}"
            )
    out += _titled("Suspect builds", found["suspect_builds"], _build_line)
    out += _titled("Suspect GPUs", found["suspect_gpus"], _gpu_line)
    out += _titled("Undetermined", found["undetermined"], _open_line)
    out += _titled("Slow GPUs", found["slow_gpus"], _slow_line)
    out += _titled("Disagreements", found["disagreements"], _disagreement_line)
    out += _titled("In production", found["production"], _production_line)
    return out


Row = Mapping[str, Any]


def _titled(title: str, rows: Sequence[Row], line: Callable[[Row], str]) -> list[str]:
    if not rows:
        return []
    more = [f"  and {len(rows) - _MOST} more; --json has all"] if len(rows) > _MOST else []
    return ["", title, *(f"  {line(row)}" for row in rows[:_MOST]), *more]


def _production_line(row: Row) -> str:
    build = f", code {row['code'][:12]}" if row["code"] else ""
    faulty = f", on {', '.join(g[:16] for g in row['gpus_faulty'])}" if row["gpus_faulty"] else ""
    return (
        f"{row['backend']} {row['fingerprint'][:12]}{build} on {row['gpu']}: {row['rows']} rows of "
        f"{row['gpus']} GPUs judged, {row['suspicions']} suspicious, {row['faults']} faults{faulty}"
    )


def _build_line(row: Mapping[str, Any]) -> str:
    seen = "; ".join(f"{s['regime']} / {s['data']} on {s['gpus_failing']} of {s['gpus']} GPUs"
                     for s in row["seen"])  # fmt: skip
    return f"{row['backend']} {row['fingerprint'][:12]} on {row['gpu']}: {seen}"


def _gpu_line(row: Mapping[str, Any]) -> str:
    seen = "; ".join(
        f"{s['backend']} {s['regime']}: {s['failures']} of {s['trials']} problems, alone among "
        f"{s['gpus']} GPUs"
        for s in row["seen"][:3]
    )
    return f"{row['device']} of node {row['node'][:12]} (odds {row['odds']:.2g}): {seen}"


def _open_line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['backend']} {row['fingerprint'][:12]} {row['regime']} / {row['data']}: "
        f"{row['gpus_failing']} of {row['gpus']} GPUs fail"
    )


def _slow_line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['device']} of node {row['node'][:12]}: {row['factor']:.3f} times the median of its "
        f"cohort with {row['backend']}, z {row['z']:g}, {row['buckets']} buckets"
    )


def _disagreement_line(row: Mapping[str, Any]) -> str:
    said = ", ".join(f"{c['backend']} on {c['nodes']}" for c in row["choices"])
    where = f"m={row['m_lo']}-{row['m_hi']} n={row['n']} k={row['k']}"
    return f"{row['gpu']} {row['profile']} {where}: {said}"
