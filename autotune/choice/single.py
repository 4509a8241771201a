"""Routed experts by one backend: engines take one for a whole model, whatever is fastest where.

What `cache.experts` adds up, from the candidates of each layer. One that may not be chosen in
every bucket that has a share of the tokens does not compete.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ...cache.experts import ExpertsLayer
from ...cache.measured import Measured
from ...cache.rows import BucketKey, Candidate
from ..verdict.buckets import MRange
from .layouts import default, key_of
from .rank import by_bucket, time_of
from .traffic import Traffic


def experts_layers(
    candidates: Iterable[Candidate], traffics: Mapping[str, Traffic]
) -> list[ExpertsLayer]:
    """Every layer of routed experts among candidates of any scope. `traffics` are by profile, as
    `layouts.traffics_of` has them; dense layers are left out."""
    layers: dict[object, list[Candidate]] = {}
    for c in candidates:
        if c.bucket.groups > 1:
            layers.setdefault(key_of(c), []).append(c)
    return [
        experts_layer(group, traffics.get(group[0].profile) or default(group[0].profile))
        for group in layers.values()
    ]


def experts_layer(candidates: Sequence[Candidate], traffic: Traffic) -> ExpertsLayer:
    """One layer's expected times; `candidates` are all of it, with their ranks."""
    groups = by_bucket(candidates)
    shares = {bucket: _share(bucket, traffic) for bucket in groups}
    weighed = [bucket for bucket, share in shares.items() if share]
    covered = math.fsum(shares[b] for b in weighed)
    times = {bucket: _choosable(groups[bucket]) for bucket in weighed}

    def mean(parts: Iterable[tuple[BucketKey, float]]) -> float:
        return math.fsum(shares[bucket] * us for bucket, us in parts) / covered

    first = candidates[0]
    oracle = None
    every: dict[str, Measured] = {}
    if weighed and all(times.values()):
        oracle = mean((b, min(t.us for t in times[b].values())) for b in weighed)
        for name in set.intersection(*(set(times[b]) for b in weighed)):
            every[name] = Measured(
                mean((b, times[b][name].us) for b in weighed),
                mean((b, times[b][name].lo) for b in weighed),
                mean((b, times[b][name].hi) for b in weighed),
            )
    covered = min(1.0, covered)
    return ExpertsLayer(first.scope, first.bucket.layer, traffic.name, covered, oracle, every)


def _share(bucket: BucketKey, traffic: Traffic) -> float:
    inside = MRange(bucket.m_lo, bucket.m_hi)
    return math.fsum(share for m, share in traffic.weights if m in inside)


def _choosable(candidates: Sequence[Candidate]) -> Mapping[str, Measured]:
    """The times of what may be chosen: safe, timed, and ranked, which leaves out what the engine
    that is chosen for has no name for."""
    ranked = (c for c in candidates if c.verdict == "safe" and c.rank is not None)
    timed = ((c.backend, time_of(c)) for c in ranked)
    return {name: time for name, time in timed if time is not None}
