"""From verdicts and times to choices: the fastest safe candidate of each bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..cache.rows import BucketKey, Candidate, Choice

NOISE = 0.02
"""Candidates within 2 % of the fastest count as equal, and a fixed order decides."""
FLOORS = ("torch-dequant", "torch-dequant-w4a4")
"""What is always there when nothing faster is safe."""


def ranked(candidates: Sequence[Candidate], time: Mapping[str, float | None]) -> list[str]:
    """Backends that may be chosen, best first: safe, timed, ties broken by name.

    `time` is what to compare by, by backend. The order depends on nothing but its arguments, so
    that every rank and node with the same evidence chooses the same.
    """
    times = {
        c.backend: t
        for c in candidates
        if c.verdict == "safe" and (t := time.get(c.backend)) is not None
    }
    order = []
    while times:
        fastest = min(times.values())
        level = [name for name, t in times.items() if t <= fastest * (1 + NOISE)]
        order.append(min(level))
        del times[order[-1]]
    return order


def choices(
    candidates: Sequence[Candidate], default_backend: str | None
) -> tuple[list[Choice], list[Candidate]]:
    """One choice per bucket, and the candidates with their ranks.

    An empty batch (m = 0) has no time of its own: it follows the smallest real bucket of its
    layer.
    """
    chosen, placed = [], []
    groups = by_bucket(candidates)
    for bucket, group in groups.items():
        times = {c.backend: c.median_us for c in group}
        if bucket.m_hi == 0:
            smallest = _smallest_real(bucket, groups)
            times = {c.backend: c.median_us for c in smallest}
        order = ranked(group, times)
        group = [
            replace(c, rank=order.index(c.backend) if c.backend in order else None) for c in group
        ]
        placed += group
        chosen.append(_choice(group, default_backend))
    return chosen, placed


def _smallest_real(
    zero: BucketKey, groups: Mapping[BucketKey, Sequence[Candidate]]
) -> Sequence[Candidate]:
    layer = [b for b in groups if b.m_lo > 0 and replace(b, m_lo=0, m_hi=0) == zero]
    return groups[min(layer, key=lambda b: b.m_lo)] if layer else ()


def _choice(group: Sequence[Candidate], default_backend: str | None) -> Choice:
    best = min((c for c in group if c.rank is not None), key=lambda c: c.rank or 0, default=None)
    floor = next((c for c in group if c.backend in FLOORS), None)
    taken = best or floor or min(group, key=lambda c: (c.backend, c.tactic))
    status = "none" if best is None else "floor" if best.backend in FLOORS else "safe"
    return Choice(
        arch=taken.arch,
        gpu=taken.gpu,
        profile=taken.profile,
        bucket=taken.bucket,
        backend=taken.backend,
        tactic=taken.tactic,
        layout=taken.layout,
        status=status,
        conditions=taken.conditions if best else (),
        median_us=taken.median_us,
        launches=taken.launches,
        problems=taken.problems,
        fingerprint=taken.fingerprint,
        default_backend=default_backend,
        bounds=taken.bounds,
    )


def by_bucket(candidates: Iterable[Candidate]) -> dict[BucketKey, list[Candidate]]:
    """Candidates grouped by bucket, buckets in the order they appear."""
    groups: dict[BucketKey, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.bucket, []).append(candidate)
    return groups
