"""Where an output is wrong: a map of its 128x128 tiles, as data, as text and as a picture.

Standard library only. The shape of the map says much about the cause: whole aligned tiles point at
a block that ran too early or never, a last column at a tail, everything at a layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from xml.sax.saxutils import escape

TILE = 128
_MOST_TILES = 1 << 20
"""More than any output that is probed has: a map read from a file must not fill the memory."""
_EMPTY, _SOME, _FULL = "·", "▒", "█"


@dataclass(frozen=True, slots=True)
class TileMap:
    """The tiles of an (m, n) output, and those that were ever wrong as (tile row, tile column)."""

    m: int
    n: int
    bad: frozenset[tuple[int, int]]

    @property
    def rows(self) -> int:
        return -(-self.m // TILE)

    @property
    def cols(self) -> int:
        return -(-self.n // TILE)

    @property
    def whole(self) -> bool:
        """Whether every tile is bad."""
        return len(self.bad) == self.rows * self.cols > 0

    def pack(self) -> dict[str, Any]:
        """As plain data: ``m``, ``n``, ``tile`` and ``rows``, a list of (bits, repeated) runs.

        Bits are a hexadecimal number, one bit a tile column, column 0 the highest bit.
        """
        lines = [0] * self.rows
        for row, col in self.bad:
            lines[row] |= 1 << (self.cols - 1 - col)
        width = -(-self.cols // 4)
        runs = [[f"{bits:0{width}x}", len(list(same))] for bits, same in groupby(lines)]
        return {"m": self.m, "n": self.n, "tile": TILE, "rows": runs}


def tiles_of(m: int, n: int, tiles: Iterable[Sequence[int]]) -> TileMap:
    """The map of an (m, n) output whose `tiles` (tile row, tile column, ...) were wrong."""
    return TileMap(m, n, frozenset((tile[0], tile[1]) for tile in tiles))


def unpack_tiles(packed: Mapping[str, Any]) -> TileMap:
    """The map that `pack` made. Raises ValueError for anything else."""
    try:
        found = TileMap(int(packed["m"]), int(packed["n"]), frozenset())
        if min(found.m, found.n) < 0 or found.rows * found.cols > _MOST_TILES:
            raise ValueError("too large")
        lines: list[int] = []
        for bits, repeated in packed["rows"]:
            if not 0 < int(repeated) <= found.rows - len(lines):
                raise ValueError("too many rows")
            lines += [int(bits, 16)] * int(repeated)
        if len(lines) != found.rows or any(line >> found.cols for line in lines):
            raise ValueError("not the rows of such an output")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is not a tile map: {error}") from None
    bad = frozenset(
        (row, col)
        for row, line in enumerate(lines)
        for col in range(found.cols)
        if line >> (found.cols - 1 - col) & 1
    )
    return TileMap(found.m, found.n, bad)


def text(tiles: TileMap, width: int = 64, height: int = 16) -> str:
    """The map in at most `width` x `height` characters; each stands for one tile or more.

    A full block: all of them are wrong; a shaded one: some; a dot: none. A last line says how many
    tiles a character stands for, where that is more than one.
    """
    if not tiles.rows or not tiles.cols:
        return "no tiles"
    down, across = -(-tiles.rows // height), -(-tiles.cols // width)
    counts: dict[tuple[int, int], int] = {}
    for row, col in tiles.bad:
        place = row // down, col // across
        counts[place] = counts.get(place, 0) + 1

    def mark(row: int, col: int) -> str:
        size = min(down, tiles.rows - row * down) * min(across, tiles.cols - col * across)
        found = counts.get((row, col), 0)
        return _EMPTY if not found else _FULL if found == size else _SOME

    lines = [
        "".join(mark(row, col) for col in range(-(-tiles.cols // across)))
        for row in range(-(-tiles.rows // down))
    ]
    if down > 1 or across > 1:
        lines.append(f"each mark: {down} x {across} tiles")
    return "\n".join(lines)


def svg(tiles: TileMap, title: str = "", note: str = "") -> str:
    """The map as an SVG picture: one square a tile, wrong ones red, the scale along two edges."""
    cell = max(2, min(24, 960 // max(tiles.cols, tiles.rows, 1)))
    left, top = 64, 56
    across, down = tiles.cols * cell, tiles.rows * cell
    width, height = max(left + across + 24, 640), top + down + 48
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<text x="{left}" y="38">{escape(note)}</text>',
        f'<rect x="{left}" y="{top}" width="{across}" height="{down}" fill="#e8ecef"/>',
    ]
    for row, group in groupby(sorted(tiles.bad), key=lambda place: place[0]):
        for first, last in _column_runs([col for _, col in group]):
            x, y = left + first * cell, top + row * cell
            parts.append(
                f'<rect x="{x}" y="{y}" width="{(last - first + 1) * cell}" height="{cell}" '
                'fill="#c62828"/>'
            )
    if cell >= 6:
        lines = [f"M{left + c * cell} {top}v{down}" for c in range(tiles.cols + 1)]
        lines += [f"M{left} {top + r * cell}h{across}" for r in range(tiles.rows + 1)]
        parts.append(f'<path d="{"".join(lines)}" stroke="white" stroke-width="1"/>')
    bottom = top + down
    parts += [
        f'<text x="{left}" y="{bottom + 16}">0</text>',
        f'<text x="{left + across}" y="{bottom + 16}" text-anchor="end">n={tiles.n}</text>',
        f'<text x="{left - 8}" y="{top + 10}" text-anchor="end">0</text>',
        f'<text x="{left - 8}" y="{bottom}" text-anchor="end">m={tiles.m}</text>',
        f'<text x="{left}" y="{bottom + 34}">{len(tiles.bad)} of {tiles.rows * tiles.cols} '
        f"tiles of {TILE} x {TILE} were wrong</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _column_runs(columns: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers in an ascending sequence."""
    runs: list[tuple[int, int]] = []
    for col in columns:
        if runs and col == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], col)
        else:
            runs.append((col, col))
    return runs
