"""What the witness would have seen of a fault that a probe found: from the numbers of the finding.

Standard library only. It is an estimate, by the formula of docs/witness.md, of the chance that a
launch like the one that failed is a suspicion where that call is watched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import erf, sqrt
from typing import Any

from .groups import groups_of
from .limits import Limit, limit

_TILE = 128
_OUTPUTS = ("wrong", "unwritten", "not finite")
"""Kinds of findings that are in an output's values."""
_ENOUGH = 0.995


@dataclass(frozen=True, slots=True)
class Foreseen:
    """`chance` that a launch like that is a suspicion; None where it cannot be told. `said` says it
    in words."""

    chance: float | None
    said: str

    def json(self) -> dict[str, Any]:
        return {"chance": self.chance, "said": self.said}


def foresee(
    kind: str, detail: Mapping[str, Any], shape: tuple[int, int, int], out_dtype: str
) -> Foreseen:
    """What the witness would have seen of a finding of that `kind` with that `detail`, in a problem
    of `shape` (m, n, k). ``alone`` in it has facts of the launch made again (`reproduce`)."""
    if kind not in _OUTPUTS:
        return Foreseen(None, "nothing: the witness looks at what a GEMM gives, and at no more")
    m, n, k = shape
    if kind == "not finite":
        return Foreseen(1.0, "every launch that gives it, where the activation itself is finite")
    groups = groups_of(n)
    alone = detail.get("alone")
    facts: Mapping[str, Any] = alone if isinstance(alone, Mapping) else {}
    wrong = int(detail.get("wrong") or facts.get("bad") or 0)
    rows = _rows_wrong(detail, facts, m, wrong)
    if not wrong or not rows:
        return Foreseen(None, "it cannot be told from what was kept of it")
    size, guess = _size(kind, facts, detail.get("worst"))
    spread = max(1, min(_groups_wrong(detail), groups.count))
    columns = max(1.0, min(groups.width, wrong / rows / spread))
    found = limit(out_dtype, groups.width, k, 0.0)  # as of a wide accumulator
    chance = in_a_row(columns, size, groups.width, found)
    whole = 1.0 - (1.0 - chance) ** (rows * spread)
    return Foreseen(round(whole, 4), _foreseen_words(whole, rows, columns, size, guess))


def in_a_row(columns: float, size: float, width: int, allowed: Limit) -> float:
    """The chance that one row's group of `width` columns is suspicious, where `columns` of them are
    off by `size` standard deviations of the row's output, independently: twice a normal number with
    the deviation ``sqrt(columns) * size`` against the limit, which grows with what is wrong."""
    sigma = sqrt(columns) * size
    norm = sqrt(width + columns * size * size)
    within = erf(allowed.of_y * norm / sigma / sqrt(2)) if sigma > 0 else 1.0
    return 1.0 - within * within


def _rows_wrong(detail: Mapping[str, Any], facts: Mapping[str, Any], m: int, wrong: int) -> int:
    """Rows with something wrong, as far as it is known."""
    if facts.get("bad_rows"):
        return int(facts["bad_rows"])
    tiles = detail.get("tiles")
    if isinstance(tiles, list) and tiles:
        heights = {tile[0]: min(_TILE, m - _TILE * tile[0]) for tile in tiles}
        return max(1, min(sum(heights.values()), wrong))
    return min(m, wrong)


def _groups_wrong(detail: Mapping[str, Any]) -> int:
    """Groups of columns, of about 1,024, over which what is wrong is spread."""
    tiles = detail.get("tiles")
    if not isinstance(tiles, list):
        return 1
    return len({tile[1] * _TILE // 1024 for tile in tiles})


def _size(kind: str, facts: Mapping[str, Any], worst: Any) -> tuple[float, bool]:
    """The size of the error of a wrong element in standard deviations, and whether it is guessed.

    What was not written holds what another launch left: a difference of two rows.
    """
    if kind == "unwritten" or facts.get("rows_from") or facts.get("cols_from"):
        return sqrt(2.0), False
    if float(facts.get("zeros") or 0.0) > 0.5:
        return 1.0, False
    relative = facts.get("relative")
    if relative:
        return float(relative), False
    try:  # of the one element that was kept
        low, high = (float(x) for x in worst["expected"])
        found, right = float(worst["found"]), (low + high) / 2
    except (TypeError, KeyError, ValueError):
        return 0.1, True
    if found == 0.0 and right:
        return 1.0, True
    return (min(8.0, abs(found - right) / abs(right)), True) if right else (1.0, True)


def _foreseen_words(chance: float, rows: int, columns: float, size: float, guess: bool) -> str:
    share = (
        "every" if chance >= _ENOUGH else f"{chance:.1%} of" if chance >= 5e-4 else "none of the"
    )
    sized = f"about {size:.2g} standard deviations" + (" (a guess)" if guess else "")
    return (
        f"{share} launch{'' if chance >= _ENOUGH else 'es'} like it, where that call is watched: "
        f"{columns:.0f} columns of {rows} row{'' if rows == 1 else 's'} off by {sized}"
    )
