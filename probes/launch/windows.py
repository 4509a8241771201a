"""Counting different problems: windows of rows that share none, of weights drawn anew."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable


class Windows:
    """Which rows of each pool have been a problem already, by whatever tells problems apart.

    A window counts where it shares no row with one counted before under the same key (regime,
    tactic, m, the pool's seed). Repeats and overlapping windows are further launches of problems
    that were there. Windows of one pool still share the weight.
    """

    def __init__(self) -> None:
        self._starts: dict[Hashable, list[int]] = {}

    def add(self, key: Hashable, offset: int, m: int) -> bool:
        """Whether the `m` rows from `offset` are a new problem; they are taken if so.

        Without a row (m = 0) only the first is.
        """
        starts = self._starts.setdefault(key, [])
        size = max(m, 1)
        at = bisect_left(starts, offset)
        before = at == 0 or starts[at - 1] + size <= offset
        after = at == len(starts) or offset + size <= starts[at]
        if not (before and after) or (m == 0 and starts):
            return False
        starts.insert(at, offset)
        return True


def window_offsets(rows: int, m: int, count: int, first: int) -> list[int]:
    """Up to `count` windows of `m` rows of a pool that share none, from row `first` on.

    `first` must leave room for one; it is moved back as far as the others need.
    """
    fits = max(1, min(count, rows // m if m else 1))
    start = max(0, min(first, rows - fits * m))
    return [start + index * m for index in range(fits)]
