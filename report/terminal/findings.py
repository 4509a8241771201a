"""Findings on a terminal: one in full, or those of one kind together."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ...autotune.evidence.wording import told, witnessed
from ...cache.rows import Finding
from ...probes.check import tilemap
from .console import lines, table

_MOST = 40
_LONGEST = 32


def print_finding(out: Console, finding: Finding) -> None:
    """One finding in full: its number, what was seen, a diagnosis, and the wrong tiles."""
    number = "" if finding.id is None else f"#{finding.id} "
    where = f"{finding.kind}, {finding.regime}, {finding.data} data"
    out.print(f"{number}{finding.backend} {finding.tactic}: {where}: {told(finding)}")
    detail = finding.detail
    if detail.get("diagnosis"):
        out.print(f"    {detail['diagnosis']}", style="dim")
    seen = witnessed(finding)
    if seen:
        out.print(f"    the witness would see {seen}", style="dim")
    retest = detail.get("retest") or {}
    if retest.get("launches"):
        low, high = retest["rate"]
        out.print(
            f"    tried again: {retest['kind']}, {retest['failures']} of {retest['launches']} "
            f"launches failed, a rate of {low:.2g} to {high:.2g} (95 %)",
            style="dim",
        )
    try:
        tiles = tilemap.unpack_tiles(detail["map"])
    except (KeyError, ValueError):
        return
    if tiles.rows * tiles.cols > 1:
        for line in tilemap.text(tiles, height=8).splitlines():
            out.print(f"    {line}", style="dim")


def print_findings(out: Console, findings: Sequence[Finding], known: bool = True) -> None:
    """Findings of one kind together: where, how many, and one in full; `known`: there is a ledger
    that would have them."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.backend, finding.kind, finding.regime, finding.data)
        groups.setdefault(key, []).append(finding)
    if not groups:
        out.print("No findings." if known else "No findings are kept here: there is no ledger.")
        return
    headings = ("backend", "kind", "regime", "data", "buckets", "tactics", "first of them")
    made = table("Findings", headings)
    for (backend, kind, regime, data), group in list(groups.items())[:_MOST]:
        first = group[0]
        said = "" if first.id is None else f"#{first.id} "
        said += told(first)
        diagnosis = first.detail.get("diagnosis")
        seen = lines(said, str(diagnosis)) if diagnosis else lines(said)
        buckets = str(len({f.bucket for f in group}))
        made.add_row(
            backend, kind, regime, data, buckets, _some_names([f.tactic for f in group]), seen
        )
    out.print(made)
    if len(groups) > _MOST:
        out.print(f"and {len(groups) - _MOST} more kinds; see fp4tune show --findings")


def _some_names(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - 1} more" if len(unique) > 1 else ""
    return shorter(unique[0]) + more


def shorter(name: str) -> str:
    """A tactic's name, cut to a column's width."""
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
