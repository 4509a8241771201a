"""Routed experts by one backend: engines take one for a whole model, whatever is fastest where.

The *oracle* takes the fastest safe backend in each bucket of each layer. What a single backend
loses against it is a share of the expected time of a call over a distribution of tokens, all
layers added up. One that is not safe in every bucket that has a share does not compete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...cache.rows import BucketKey, Candidate
from ..verdict.buckets import MRange
from .rank import by_bucket
from .traffic import Traffic


@dataclass(frozen=True, slots=True)
class Single:
    """One backend for all: its expected microseconds, and by how many percent that is more than
    the oracle's."""

    backend: str
    expected_us: float
    loss_percent: float

    def json(self) -> dict[str, Any]:
        return asdict(self)


def single_backends(candidates: Sequence[Candidate], traffic: Traffic) -> list[Single]:
    """The backends that are safe wherever routed experts were probed, the fastest first; equal ones
    by name. Empty where there is none, or no tokens of the traffic were probed.

    `candidates` are of one GPU model and profile; those of dense layers are left out.
    """
    groups = by_bucket([c for c in candidates if c.bucket.groups > 1])
    shares = {bucket: _share(bucket, traffic) for bucket in groups}
    weighed = [bucket for bucket, share in shares.items() if share]
    times = {bucket: _safe_times(groups[bucket]) for bucket in weighed}
    if not weighed or not all(times.values()):
        return []
    oracle = math.fsum(shares[b] * min(times[b].values()) for b in weighed)
    everywhere = set.intersection(*(set(times[b]) for b in weighed))
    found = []
    for name in everywhere:
        expected = math.fsum(shares[b] * times[b][name] for b in weighed)
        found.append(Single(name, expected, 100 * (expected / oracle - 1) if oracle else 0.0))
    return sorted(found, key=lambda each: (each.expected_us, each.backend))


def _share(bucket: BucketKey, traffic: Traffic) -> float:
    inside = MRange(bucket.m_lo, bucket.m_hi)
    return math.fsum(share for m, share in traffic.weights if m in inside)


def _safe_times(candidates: Sequence[Candidate]) -> Mapping[str, float]:
    return {
        c.backend: c.median_us
        for c in candidates
        if c.verdict == "safe" and c.median_us is not None
    }
