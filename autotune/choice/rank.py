"""From verdicts and times to choices: the fastest safe candidate of each bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ...cache.measured import NOISE, Measured, fastest_of, in_order, measured
from ...cache.rows import BucketKey, Candidate, Choice

WORTH = 0.03
"""How much faster another must be to replace a choice that stands."""
DENSE_FLOORS = ("torch-dequant", "torch-dequant-w4a4")
FLOORS = (*DENSE_FLOORS, "torch-experts")
"""What is always there when nothing faster is safe."""


def time_of(candidate: Candidate) -> Measured | None:
    return measured(candidate.median_us, candidate.lo_us, candidate.hi_us)


def ranked(
    candidates: Sequence[Candidate],
    time: Mapping[str, Measured | None],
    default: str | None = None,
    stands: str | None = None,
) -> list[str]:
    """Backends that may be chosen, best first: safe, timed, ties broken by a fixed order.

    `time` is what to compare by, by backend. Of equals the engine's `default` comes first, then
    names decide. The one that `stands` stays in front until the fastest is told apart from it and
    at least `WORTH` faster, or the default is faster by more than `NOISE`: a choice is never slower
    than a safe default. The order depends on nothing but the arguments,
    so that every rank and node with the same evidence chooses the same, on a noisy machine too.
    """
    times = {
        c.backend: t
        for c in candidates
        if c.verdict == "safe" and (t := time.get(c.backend)) is not None
    }
    first = _kept_choice(times, default, stands)
    left = {name: t for name, t in times.items() if name != first}
    return [*([first] if first else ()), *in_order(left, default)]


def _kept_choice(
    times: Mapping[str, Measured], default: str | None, stands: str | None
) -> str | None:
    """`stands`, where it is to be kept."""
    if stands is None or stands not in times:
        return None
    mine, fastest = times[stands], fastest_of(times)
    if fastest.us <= mine.us * (1 - WORTH) and not mine.level_with(fastest):
        return None
    usual = times.get(default or "", mine)
    return stands if mine.us <= usual.us * (1 + NOISE) else None


def choices(
    candidates: Sequence[Candidate],
    default_backend: str | None,
    standing: Iterable[Choice] = (),
    unnamed: Callable[[Candidate], bool] = lambda candidate: False,
) -> tuple[list[Choice], list[Candidate]]:
    """One choice per bucket, and the candidates with their ranks.

    Those of which `unnamed` holds, since the engine that they are chosen for has no name for them,
    are listed and never chosen; but for a floor, which is what an engine falls back to, where
    nothing that it can name is left. `standing` are the choices published before, of the same
    scope; only a safe one stands. An empty batch (m = 0) has no time of its own: it follows the
    smallest real bucket of its layer.
    """
    chosen, placed = [], []
    groups = by_bucket(candidates)
    stands = {c.bucket: c.backend for c in standing if c.status == "safe"}
    for bucket, group in groups.items():
        times = {c.backend: time_of(c) for c in group}
        if bucket.m_hi == 0:
            smallest = _smallest_real(bucket, groups)
            times = {c.backend: time_of(c) for c in smallest}
        able = [c for c in group if not unnamed(c)]
        order = ranked(able, times, default_backend, stands.get(bucket))
        last = [c for c in group if c.backend in FLOORS and c not in able]
        order += ranked(last, times, default_backend)
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
