"""A map of wrong tiles: as data, as text, as a picture."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.check import tilemap
from fp4tune.probes.check.tilemap import TILE, TileMap


@st.composite
def maps(draw) -> TileMap:
    m, n = draw(st.integers(1, 20 * TILE)), draw(st.integers(1, 70 * TILE))
    empty = TileMap(m, n, frozenset())
    place = st.tuples(st.integers(0, empty.rows - 1), st.integers(0, empty.cols - 1))
    return TileMap(m, n, frozenset(draw(st.sets(place, max_size=40))))


@settings(deadline=None)
@given(maps())
def test_packing_loses_nothing(tiles):
    assert tilemap.unpack_tiles(tiles.pack()) == tiles


@settings(deadline=None)
@given(maps(), st.integers(1, 80), st.integers(1, 20))
def test_the_text_fits_and_marks_a_tile_just_where_one_is_wrong(tiles, width, height):
    lines = tilemap.text(tiles, width, height).splitlines()
    marks = [line for line in lines if not line.startswith("each")]
    assert len(marks) <= height and all(len(line) <= width for line in marks)
    assert bool(tiles.bad) == any(set(line) & {"▒", "█"} for line in marks)
    if tiles.whole:
        assert set("".join(marks)) == {"█"}


@settings(deadline=None)
@given(maps())
def test_the_picture_is_xml_with_every_wrong_tile_in_it(tiles):
    root = ElementTree.fromstring(tilemap.svg(tiles, "a <title> & more", "note"))
    red = [e for e in root.iter() if e.get("fill") == "#c62828"]
    cell = max(2, min(24, 960 // max(tiles.cols, tiles.rows)))
    area = sum(int(e.get("width", 0)) * int(e.get("height", 0)) for e in red)
    assert area == len(tiles.bad) * cell * cell


def test_downsampling_says_so():
    tiles = tilemap.tiles_of(4096, 28672, [(0, 0, 5), (31, 223, 1)])
    assert tilemap.text(tiles, 64, 16).splitlines()[-1] == "each mark: 2 x 4 tiles"


@pytest.mark.parametrize(
    "packed",
    [
        {},
        {"m": 128, "n": 128, "rows": [["3", 1]]},
        {"m": 128, "n": 128, "rows": [["1", 2]]},
        {"m": 128, "n": 128, "rows": [["x", 1]]},
        {"m": 1 << 40, "n": 1 << 40, "rows": []},
        {"m": 256, "n": 128, "rows": [["1", 1]]},
    ],
)
def test_what_is_no_map_is_refused(packed):
    with pytest.raises(ValueError, match="not a tile map"):
        tilemap.unpack_tiles(packed)
