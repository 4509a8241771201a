"""Findings of one kind together: how many, one in full with its diagnosis, and a map of tiles."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ...cache.rows import Finding
from ..terminal import tables
from . import tiles
from .markup import details, el, mark, short
from .numbers import count

_MOST = 60
"""Kinds of findings that are shown."""
_NUMBERS = 12
_OPEN = 3
_LOOKED_AT = 64
GRADES = ("host sync", "plan per m")
"""Kinds that are no fault: what to make of them is up to the engine."""


def groups(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings of one backend, kind, regime and data together, as they were found."""
    found: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.backend, finding.kind, finding.regime, finding.data)
        found.setdefault(key, []).append(finding)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Kind:
    """Findings of one kind: the one that shows most, how many there are in how many buckets, and
    what else there is to say in a line."""

    shown: Finding
    findings: int
    buckets: int
    note: str = ""


def kinds(findings: Sequence[Finding]) -> list[Kind]:
    """A node's findings by kind."""
    return [
        Kind(_telling(group), len(group), len({f.bucket for f in group}), _numbers(group))
        for group in groups(findings)
    ]


def section(found: Sequence[Kind], first: Collection[str] = ()) -> Markup:
    """All kinds of findings, the first few unfolded; those of the backends in `first` lead."""
    if not found:
        return el("p", mark("safe", "✓", "No findings are stored.", True))
    found = sorted(found, key=lambda kind: kind.shown.backend not in first)
    parts = [_kind(kind, at < _OPEN) for at, kind in enumerate(found[:_MOST])]
    if len(found) > _MOST:
        parts.append(el("p", f"and {len(found) - _MOST} more kinds: fp4tune show --findings"))
    return Markup("").join(parts)


def _kind(kind: Kind, open_: bool) -> Markup:
    first = kind.shown
    graded = first.kind in GRADES
    summary = (
        mark("inconclusive" if graded else "unsafe", "•" if graded else "✗",
             f"{first.backend}: {first.kind}", seen=True),
        el(
            "span",
            f" in {first.regime}, {first.data} data; {count(kind.findings, 'finding')} in "
            f"{count(kind.buckets, 'bucket')}",
            class_="soft",
        ),
    )  # fmt: skip
    detail = first.detail
    rows = [
        ("seen", f"{_number(first)}{_described(first)}"),
        ("tactic", short(first.tactic, 160)),
        ("diagnosis", detail.get("diagnosis")),
        ("tried again", _retest(detail.get("retest"))),
        ("all of them", kind.note),
    ]
    listed = [(name, value) for name, value in rows if value]
    body = el("dl", [el("div", el("dt", n), el("dd", v)) for n, v in listed], class_="finding")
    return details(summary, body, tiles.figure(detail.get("map")), open_=open_)


def _telling(group: Sequence[Finding]) -> Finding:
    """The finding that shows most: the largest map of those that are not wrong everywhere, else
    the largest, else the first."""
    return max(group[:_LOOKED_AT], key=lambda f: tiles.weight(f.detail.get("map")))


def _described(finding: Finding) -> str:
    try:
        return tables.describe(finding)
    except (KeyError, TypeError, ValueError, AttributeError):
        return "stored in a way that this version does not understand"


def _retest(retest: Any) -> str | None:
    try:
        if not retest or not retest["launches"]:
            return None
        low, high = (float(x) for x in retest["rate"])
        return (
            f"{retest['kind']}: {retest['failures']} of {retest['launches']} launches failed, "
            f"a rate of {low:.2g} to {high:.2g} (95 %)"
        )
    except (KeyError, TypeError, ValueError):
        return None


def _number(finding: Finding) -> str:
    return "" if finding.id is None else f"#{finding.id} "


def _numbers(group: Sequence[Finding]) -> str:
    known = [f"#{f.id}" for f in group if f.id is not None]
    if len(known) < 2:
        return ""
    more = f" and {len(known) - _NUMBERS} more" if len(known) > _NUMBERS else ""
    return f"{', '.join(known[:_NUMBERS])}{more}; fp4tune reproduce NUMBER makes one again"
