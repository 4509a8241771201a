"""Findings of one kind together: how many, one in full with its diagnosis, and a map of tiles."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ...autotune.evidence.wording import told, witnessed
from ...cache.rows import Finding
from .tiles import TileFigure, figure, weight

_MOST = 60
"""Kinds of findings that are shown."""
_NUMBERS = 12
_LOOKED_AT = 64
GRADES = ("host sync", "plan per m", "run to run", "setting changed")
"""Kinds that are no fault: what to make of them is up to the engine."""


@dataclass(frozen=True, slots=True)
class FindingKind:
    """Findings of one kind: the one that shows most, how many there are in how many buckets, and
    what else there is to say in a line."""

    shown: Finding
    findings: int
    buckets: int
    note: str = ""

    @property
    def graded(self) -> bool:
        return self.shown.kind in GRADES

    @property
    def seen(self) -> str:
        return ("" if self.shown.id is None else f"#{self.shown.id} ") + told(self.shown)

    @property
    def retest(self) -> str:
        return _retest(self.shown.detail.get("retest"))

    @property
    def witness(self) -> str:
        """What the witness would have seen of it in production."""
        seen = witnessed(self.shown)
        return f"The witness would see {seen}." if seen else ""

    @property
    def figure(self) -> TileFigure | None:
        return figure(self.shown.detail.get("map"))


@dataclass(frozen=True, slots=True)
class Findings:
    """All kinds that are shown. `note` is in place of them where nothing can be said."""

    kinds: tuple[FindingKind, ...] = ()
    more: int = 0
    note: str = ""


def groups(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings of one backend, kind, regime and data together, as they were found."""
    found: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.backend, finding.kind, finding.regime, finding.data)
        found.setdefault(key, []).append(finding)
    return list(found.values())


def kinds(findings: Sequence[Finding]) -> list[FindingKind]:
    """A node's findings by kind."""
    return [
        FindingKind(_telling(group), len(group), len({f.bucket for f in group}), _numbers(group))
        for group in groups(findings)
    ]


def section(found: Sequence[FindingKind], first: Collection[str] = ()) -> Findings:
    """All kinds of findings; those of the backends in `first` lead."""
    order = sorted(found, key=lambda kind: kind.shown.backend not in first)
    return Findings(tuple(order[:_MOST]), max(0, len(order) - _MOST))


def _telling(group: Sequence[Finding]) -> Finding:
    """The finding that shows most: the largest map of those that are not wrong everywhere, else
    the largest, else the first."""
    return max(group[:_LOOKED_AT], key=lambda f: weight(f.detail.get("map")))


def _retest(retest: Any) -> str:
    try:
        if not retest or not retest["launches"]:
            return ""
        low, high = (float(x) for x in retest["rate"])
        return (
            f"{retest['kind']}: {retest['failures']} of {retest['launches']} launches failed, "
            f"a rate of {low:.2g} to {high:.2g} (95 %)"
        )
    except (KeyError, TypeError, ValueError):
        return ""


def _numbers(group: Sequence[Finding]) -> str:
    known = [f"#{f.id}" for f in group if f.id is not None]
    if len(known) < 2:
        return ""
    more = f" and {len(known) - _NUMBERS} more" if len(known) > _NUMBERS else ""
    return f"{', '.join(known[:_NUMBERS])}{more}; fp4tune reproduce NUMBER makes one again"
