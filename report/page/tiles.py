"""A finding's map of wrong tiles, inside the page."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ...probes.check import tilemap
from ...probes.check.tilemap import TILE, TileMap
from .markup import el

WIDTH, HEIGHT = 64, 32
"""Marks at most, across and down; of a larger map each mark stands for several tiles."""


def weight(packed: Any) -> tuple[bool, int]:
    """How much a map shows: one in part wrong more than one that is wrong everywhere or is none,
    and of these the larger."""
    try:
        tiles = tilemap.unpack(packed)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False, 0
    return not tiles.whole, tiles.rows * tiles.cols


def figure(packed: Any) -> Markup:
    """The map that `tilemap.TileMap.pack` made, with its scale in words; nothing where it is none,
    or where there is but one tile."""
    try:
        tiles = tilemap.unpack(packed)
    except (KeyError, TypeError, ValueError, OverflowError):
        return Markup("")
    if tiles.rows * tiles.cols < 2:
        return Markup("")
    down, across = -(-tiles.rows // HEIGHT), -(-tiles.cols // WIDTH)
    said = (
        f"{len(tiles.bad)} of {tiles.rows * tiles.cols} tiles of {TILE} x {TILE} were ever wrong "
        f"(m = {tiles.m} from top to bottom, n = {tiles.n} from left to right"
    )
    said += f"; each mark stands for {down} x {across} tiles)" if down * across > 1 else ")"
    return el("figure", _svg(tiles, down, across, said), el("figcaption", said), class_="tiles")


def _svg(tiles: TileMap, down: int, across: int, said: str) -> Markup:
    """One square a mark: full and solid where all of its tiles are wrong, smaller and paler where
    some are."""
    counts: dict[tuple[int, int], int] = {}
    for row, col in tiles.bad:
        place = row // down, col // across
        counts[place] = counts.get(place, 0) + 1
    full, part = [], []
    for (row, col), found in sorted(counts.items()):
        size = min(down, tiles.rows - row * down) * min(across, tiles.cols - col * across)
        if found == size:
            full.append(f"M{col}.06 {row}.06h.88v.88h-.88z")
        else:
            part.append(f"M{col}.2 {row}.2h.6v.6h-.6z")
    rows, cols = -(-tiles.rows // down), -(-tiles.cols // across)
    return el(
        "svg",
        el("path", d=Markup("").join(full), class_="all") if full else None,
        el("path", d=Markup("").join(part), class_="some") if part else None,
        viewBox=f"0 0 {cols} {rows}",
        role="img",
        aria_label=said,
        # Few tiles are not blown up to the width of the page.
        style=f"max-width:{cols * 1.5:g}rem",
    )
