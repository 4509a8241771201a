"""How the columns of an output are cut into groups, each of which has a sum of its own.

A group has at most `WIDEST` columns, so that one massive column hides only what is in its group.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

WIDEST = 1024
_STEP = 64
"""Groups begin at multiples of this many columns: 128 bytes of 16-bit numbers."""


@dataclass(frozen=True, slots=True)
class Groups:
    """`count` groups of `width` columns of an output of `n`; the last may be narrower."""

    n: int
    width: int

    @property
    def count(self) -> int:
        return -(-self.n // self.width)

    def columns(self, group: int) -> slice:
        """The columns of a group."""
        return slice(group * self.width, min(self.n, (group + 1) * self.width))

    def __iter__(self) -> Iterator[slice]:
        return (self.columns(group) for group in range(self.count))


def groups_of(n: int, widest: int = WIDEST) -> Groups:
    """The groups of an output of n columns, about equally wide. Raises ValueError for n < 1."""
    if n < 1 or widest < _STEP:
        raise ValueError(f"n={n} columns cannot be cut into groups of up to {widest}")
    count = -(-n // widest)
    width = -(-n // count)
    return Groups(n, min(-(-width // _STEP) * _STEP, widest))
