"""What a problem is stored under: its layer, and the bucket of an m range."""

from __future__ import annotations

from ..cache.rows import BucketKey, LayerKey, Where
from ..probes import quantisers
from ..probes.problem import Problem
from .verdict.buckets import MRange


def layer_key(p: Problem) -> LayerKey:
    """The layer that `p` is a problem of, whatever its m."""
    return LayerKey(p.format, p.activation, p.out_dtype, p.groups, p.n, p.k)


def bucket_key(p: Problem, m: MRange | None = None) -> BucketKey:
    """The bucket of `m` in the layer of `p`; without it, one that spans every m of the layer."""
    lo, hi = (0, p.m) if m is None else (m.lo, m.hi)
    return layer_key(p).bucket(lo, hi)


def quantiser_place(name: str, p: Problem, m: MRange | None = None) -> Where:
    """What evidence of a quantiser of the activations of `p` is of: a GEMM's bucket without an n;
    without `m`, one that spans all that it is probed at."""
    lo, hi = (1, max(quantisers.ROWS)) if m is None else (m.lo, m.hi)
    layer = LayerKey(p.format, "fp4", p.out_dtype, 1, 0, p.k)
    return Where(name, "default", layer.bucket(lo, hi))
