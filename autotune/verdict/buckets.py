"""Classes of m that share one choice, and the bucket as the cache's key knows it.

m is rounded up to an edge: powers of two to 256, multiples of 256 to 2048, multiples of 512 to
4096, then powers of two. These are the steps of FlashInfer's autotuner (0.7), so that a bucket
here never spans two tactics of its own. m = 0 (an idle data-parallel rank) is a bucket by itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SMALL = 1024
"""In buckets of larger m a few rows more or less change little."""
MAX_M = 65536
"""The largest m asked about unless told otherwise: a long prefill chunk."""


@dataclass(frozen=True, slots=True, order=True)
class MRange:
    """The integers lo..hi, both included."""

    lo: int
    hi: int

    def __contains__(self, m: int) -> bool:
        return self.lo <= m <= self.hi

    def __str__(self) -> str:
        return str(self.hi) if self.lo == self.hi else f"{self.lo}-{self.hi}"


def edge_of(m: int) -> int:
    """m rounded up to its bucket's edge. Raises ValueError below 0."""
    if m < 0:
        raise ValueError(f"m={m} is negative")
    if m <= 256 or m > 4096:
        return 1 << (m - 1).bit_length() if m else 0
    step = 256 if m <= 2048 else 512
    return -(-m // step) * step


def _edge_below(edge: int) -> int:
    """The edge before `edge`; -1 before 0."""
    if edge <= 256 or edge > 4096:
        return edge // 2 if edge > 1 else edge - 1
    return edge - (256 if edge <= 2048 else 512)


def edges(max_m: int = MAX_M) -> Iterator[int]:
    """Every edge from 0 to that of `max_m`, ascending."""
    edge = 0
    last = edge_of(max_m)
    while edge <= last:
        yield edge
        edge = edge_of(edge + 1)


def bucket_of(m: int) -> MRange:
    """The bucket that holds m. Raises ValueError below 0."""
    hi = edge_of(m)
    return MRange(_edge_below(hi) + 1, hi)


def ranges(max_m: int = MAX_M) -> list[MRange]:
    """The buckets from 0 to the one that holds `max_m`, ascending and without a gap."""
    return [bucket_of(edge) for edge in edges(max_m)]


def representative(bucket: MRange) -> int:
    """The m a bucket is timed at: its upper edge, the most work and what tuners profile."""
    return bucket.hi


def representatives(bucket: MRange) -> tuple[int, ...]:
    """The m a bucket is timed at: both edges, and the middle of a small one, ascending."""
    middle = (bucket.lo + bucket.hi) // 2 if bucket.hi <= SMALL else bucket.hi
    return tuple(sorted({bucket.lo, middle, bucket.hi}))


def ragged(bucket: MRange, count: int, rng: random.Random) -> list[int]:
    """Different m of a bucket to run checks at: both edges, then random ones between, shuffled.

    `count` in all, or fewer where the bucket has fewer, but never without its edges.
    """
    chosen = {bucket.lo, bucket.hi}
    inside = range(bucket.lo + 1, bucket.hi)
    chosen.update(rng.sample(inside, max(0, min(count - len(chosen), len(inside)))))
    found = sorted(chosen)
    rng.shuffle(found)
    return found
