"""Buckets of m partition the integers and are FlashInfer's own steps."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.autotune.verdict.buckets import (
    MRange,
    bucket_of,
    edge_of,
    edges,
    ragged,
    ranges,
    representative,
)

EDGES = tuple(edges())
ms = st.integers(0, 2**20)


def test_the_documented_edges():
    assert EDGES[:10] == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert EDGES[10:17] == (512, 768, 1024, 1280, 1536, 1792, 2048)
    assert EDGES[17:24] == (2560, 3072, 3584, 4096, 8192, 16384, 32768)


@given(ms)
def test_a_bucket_holds_its_m_and_only_its_own(m):
    bucket = bucket_of(m)
    assert m in bucket
    assert bucket_of(bucket.lo) == bucket_of(bucket.hi) == bucket
    assert bucket_of(bucket.hi + 1).lo == bucket.hi + 1
    assert representative(bucket) == edge_of(m) == bucket.hi >= m


@given(ms)
def test_ranges_partition_the_integers(max_m):
    found = ranges(max_m)
    assert found[0] == MRange(0, 0)
    assert all(a.hi + 1 == b.lo for a, b in itertools.pairwise(found))
    assert max_m in found[-1]


@given(st.integers(1, 2**20))
def test_edges_are_flashinfers(m):
    utils = pytest.importorskip("flashinfer.fused_moe.utils")
    mapper = getattr(utils, "map_to_hybrid_bucket_uncapped", None)
    if mapper is None:
        pytest.skip("this FlashInfer has other buckets")
    assert edge_of(m) == mapper(m)


def test_negative_m_is_refused():
    with pytest.raises(ValueError, match="m=-1"):
        bucket_of(-1)


@given(m=ms, count=st.integers(0, 40), seed=st.integers())
def test_ragged_ms_are_different_inside_and_include_both_edges(m, count, seed):
    bucket = bucket_of(m)
    found = ragged(bucket, count, random.Random(seed))
    assert len(set(found)) == len(found)
    assert all(each in bucket for each in found)
    assert {bucket.lo, bucket.hi} <= set(found)
    size = bucket.hi - bucket.lo + 1
    assert len(found) == min(size, max(count, min(size, 2)))
    assert found == ragged(bucket, count, random.Random(seed))
