"""What a problem is stored under: its layer, and the bucket of an m range."""

from __future__ import annotations

from ..cache.rows import BucketKey, LayerKey
from ..probes.problem import Problem
from .verdict.buckets import MRange


def layer_key(p: Problem) -> LayerKey:
    """The layer that `p` is a problem of, whatever its m."""
    return LayerKey(p.format, p.activation, p.out_dtype, p.groups, p.n, p.k)


def bucket_key(p: Problem, m: MRange | None = None) -> BucketKey:
    """The bucket of `m` in the layer of `p`; without it, one that spans every m of the layer."""
    lo, hi = (0, p.m) if m is None else (m.lo, m.hi)
    return layer_key(p).bucket(lo, hi)
