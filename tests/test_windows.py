"""Different problems are windows of rows that share none."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.launch.windows import Windows, window_offsets


@settings(deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 40), max_size=30))
def test_windows_that_count_share_no_row(m, starts):
    seen = Windows()
    counted = [start for start in starts if seen.add("pool", start, m)]
    rows = [row for start in counted for row in range(start, start + m)]
    assert len(rows) == len(set(rows))
    taken = set(rows)
    for start in starts:
        assert taken & set(range(start, start + m)), "a window that shares no row was left out"


def test_the_same_rows_of_another_pool_count_again():
    seen = Windows()
    assert seen.add("one", 0, 4) and seen.add("two", 0, 4)
    assert not seen.add("one", 3, 4)


def test_without_rows_there_is_one_problem():
    seen = Windows()
    assert [seen.add("pool", start, 0) for start in (0, 0, 7)] == [True, False, False]


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 50), st.integers(1, 30), st.data())
def test_offsets_fit_the_pool_and_share_no_row(spare, m, count, data):
    rows = m + spare
    first = data.draw(st.integers(0, spare))
    found = window_offsets(rows, m, count, first)
    assert 1 <= len(found) <= count
    assert all(start >= 0 and start + m <= rows for start in found)
    assert all(b - a >= m for a, b in zip(found, found[1:], strict=False))
