"""A finding's map of wrong tiles, as a drawing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ...probes.check import tilemap
from ...probes.check.tilemap import TILE, TileMap

WIDTH, HEIGHT = 64, 32
"""Marks at most, across and down; of a larger map each mark stands for several tiles."""


@dataclass(frozen=True, slots=True)
class TileFigure:
    """A drawing of `columns` by `rows` marks as two paths of SVG, for marks all of whose tiles are
    wrong and for those where some are; and what it shows in words."""

    columns: int
    rows: int
    all_wrong: Markup
    some_wrong: Markup
    said: str

    @property
    def width(self) -> str:
        """In rem: few tiles are not blown up to the width of the page."""
        return f"{self.columns * 1.5:g}"


def _tile_map(packed: Any) -> TileMap | None:
    try:
        return tilemap.unpack_tiles(packed)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def weight(packed: Any) -> tuple[bool, int]:
    """How much a map shows: one in part wrong more than one that is wrong everywhere or is none,
    and of these the larger."""
    tiles = _tile_map(packed)
    return (False, 0) if tiles is None else (not tiles.whole, tiles.rows * tiles.cols)


def figure(packed: Any) -> TileFigure | None:
    """The map that `tilemap.TileMap.pack` made, with its scale in words; None where it is none, or
    where there is but one tile."""
    tiles = _tile_map(packed)
    if tiles is None or tiles.rows * tiles.cols < 2:
        return None
    down, across = -(-tiles.rows // HEIGHT), -(-tiles.cols // WIDTH)
    said = (
        f"{len(tiles.bad)} of {tiles.rows * tiles.cols} tiles of {TILE} x {TILE} were ever wrong "
        f"(m = {tiles.m} from top to bottom, n = {tiles.n} from left to right"
    )
    said += f"; each mark stands for {down} x {across} tiles)" if down * across > 1 else ")"
    counts: dict[tuple[int, int], int] = {}
    for row, col in tiles.bad:
        place = row // down, col // across
        counts[place] = counts.get(place, 0) + 1
    full, part = "", ""
    for (row, col), found in sorted(counts.items()):
        size = min(down, tiles.rows - row * down) * min(across, tiles.cols - col * across)
        if found == size:
            full += f"M{col}.06 {row}.06h.88v.88h-.88z"
        else:
            part += f"M{col}.2 {row}.2h.6v.6h-.6z"
    return TileFigure(
        -(-tiles.cols // across), -(-tiles.rows // down), Markup(full), Markup(part), said
    )
