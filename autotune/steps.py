"""The steps of a backend on a layer, and where the next run goes on after one that was killed.

A step is finished when its row is in the ledger; what it recorded is committed with that row, as
one. So a run that goes on never measures again what is finished, and never finds half of a step. A
step is of some items, tactics in ranges of m. Pure: rows in, `Started` out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cache.rows import FinishedStep
from .verdict.buckets import MRange

BEGUN = "begun"
"""The first, of no item: how the backend is measured there."""
OPEN = "not opened"
"""The layer could not be opened in its worker: there is no other step."""
GRADED = "graded"
CENSUS = "census"
TACTICS = "tactics"
"""Which tactic is the fastest in every range of m."""
TIMING = "timing"
"""Timed beside the others."""
_FAMILY, _REGIME, _LENGTH = "family ", "regime ", "at length "

Item = tuple[MRange, str]
"""A range of m, and a tactic in it."""


def family(name: str) -> str:
    """The step that launches on data of this family."""
    return _FAMILY + name


def regime(name: str) -> str:
    """The step that launches under this regime."""
    return _REGIME + name


def at_length(name: str) -> str:
    """The step that launches under this regime until its aim is reached."""
    return _LENGTH + name


def listed(items: Iterable[Item]) -> list[list[Any]]:
    """Items as a row keeps them."""
    return [[m.lo, m.hi, tactic] for m, tactic in items]


def items_of(rows: Iterable[Sequence[Any]]) -> list[Item]:
    """Items as `listed` made them."""
    return [(MRange(lo, hi), str(tactic)) for lo, hi, tactic in rows]


@dataclass(slots=True)
class Started:
    """What a backend finished of a layer in `runs`, which were ended before they had all of it.

    `at` is when the first of them began it (seconds since 1970), `how` the last `BEGUN`.
    """

    how: Mapping[str, Any]
    runs: tuple[str, ...]
    at: float
    seeds: frozenset[int]
    done: set[tuple[str, MRange, str]] = field(default_factory=set)
    """By step, range of m and tactic."""
    opened: bool = True
    winner: dict[MRange, str] | None = None
    """None where the tactics are still to be compared."""
    dead: dict[str, str] = field(default_factory=dict)
    faulty: set[Item] = field(default_factory=set)
    exempt: dict[tuple[str, MRange, str], str] = field(default_factory=dict)
    reached: dict[tuple[str, MRange, str], int] = field(default_factory=dict)
    """How many launches were aimed at."""
    timed: FinishedStep | None = None
    steps: int = 0
    """How many were finished."""


def started(rows: Sequence[FinishedStep]) -> Started | None:
    """What these steps, of one backend on one layer and in their order, come to; None where none
    but `BEGUN` is among them."""
    begun = [row for row in rows if row.what == BEGUN]
    if len(begun) == len(rows):
        return None
    found = Started(
        begun[-1].detail,
        tuple(dict.fromkeys(row.run for row in rows)),
        min(float(row.detail["at"]) for row in begun),
        frozenset(int(row.detail["seed"]) for row in begun),
    )
    for row in rows:
        if row.what == BEGUN:
            continue
        detail, items = row.detail, items_of(row.detail["items"])
        found.steps += 1
        found.dead.update(detail["dead"])
        found.faulty.update(items_of(detail["faulty"]))
        for regime_, lo, hi, tactic, why in detail["exempt"]:
            found.exempt[str(regime_), MRange(lo, hi), str(tactic)] = str(why)
        if row.what == TIMING:
            found.timed = row
        elif row.what == TACTICS:
            found.winner = dict(items)
        else:
            if not row.what.startswith((_REGIME, _LENGTH)):
                # Tactics are compared, and then timed, once the last of them is graded.
                found.winner = found.timed = None
            found.opened = found.opened and row.what != OPEN
            for m, tactic in items:
                key = (row.what, m, tactic)
                found.done.add(key)
                found.reached[key] = max(found.reached.get(key, 0), int(detail["launches"]))
    if any((GRADED, m, tactic) not in found.done for m, tactic in (found.winner or {}).items()):
        found.winner = found.timed = None  # its grading was taken back
    return found
