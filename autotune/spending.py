"""Stressing a layer within a time budget: see `allowance` for what goes first, and what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cache.rows import BucketKey, Candidate
from . import allowance
from .allowance import OVER, SLOWER, Allowance
from .entrants import Entrant, Layer, not_tried
from .evidence.recorder import Recorder
from .plan import Plan
from .stages.conclude import judge
from .verdict.bounds import Bound, codes, kernel, pool
from .verdict.buckets import MRange
from .verdict.rules import SAFE, Doubt

Run = Callable[[Mapping[str, Sequence[MRange]], Sequence[Entrant]], None]
"""Puts these entrants, by name with their m ranges, through the regimes."""


def allow(
    plan: Plan, record: Recorder, doubts: Mapping[str, Doubt], start: float
) -> Allowance | None:
    """The budget of a probe that began at `start` (of `time.monotonic`), None where it has none.

    Builds are part of it and all end before the first layer begins: compilers take the cores that
    launch what is timed, so only a layer's grading could overlap, and that needs all its entrants.
    """
    if plan.budget is None:
        return None
    known: dict[int, tuple[Any, Any]] = {}

    def proven(backend: str, tactic: str, bucket: BucketKey) -> bool:
        bounds: Mapping[str, Bound] = {}
        if plan.aim is not None:
            count = len(record.exact)
            if count not in known:
                known.clear()
                known[count] = codes(record.exact), pool(record.exact, plan.confidence)
            digests, pooled = known[count]
            bounds = pooled.get(kernel(backend, tactic, bucket, digests), {})
        facts = record.facts((backend, tactic, bucket))
        return judge(plan, facts, bounds, doubts).status == SAFE

    return Allowance(plan.budget, proven, start)


def from_the_fastest(
    layer: Layer, budget: Allowance, tried: Sequence[Entrant], run: Run, record: Recorder
) -> None:
    """Run waves until two candidates of every m range are proven; the rest is told `not tried`.

    Ends with the budget, too: what was not tried then says so.
    """
    by_name = {entrant.name: entrant for entrant in tried}
    times = {entrant.name: entrant.median_us for entrant in tried}
    orders = {
        m: [name for name in allowance.order(times, m) if m in by_name[name].winner]
        for m in layer.ranges
    }
    if layer.agreement:
        scope = (layer.target.name, layer.problem)
        orders = {m: layer.agreement.order(scope, m, own) for m, own in orders.items()}
    done: dict[MRange, list[str]] = {m: [] for m in layer.ranges}

    def proven(name: str, m: MRange) -> bool:
        return budget.proven(name, by_name[name].winner[m], layer.bucket(m))

    while not budget.over and (wave := allowance.next_wave(orders, done, proven)):
        run(wave, tried)
        for name, ranges in wave.items():
            for m in ranges:
                done[m].append(name)
    for m, names in orders.items():
        enough = sum(proven(name, m) for name in done[m]) >= allowance.ENOUGH
        for name in names:
            if name not in done[m] and not by_name[name].known:
                why = SLOWER if enough else OVER
                not_tried(layer, by_name[name], m, by_name[name].winner[m], why, record)


def unfinished(
    candidates: Sequence[Candidate], cut: Sequence[Layer]
) -> tuple[list[Candidate], list[dict[str, object]]]:
    """Candidates to publish where the budget ended in the layers `cut`, or before them; and what is
    left of these: their m ranges without a proven candidate. Nothing is published of such a range,
    so that what stood there before goes on standing.
    """
    safe = {c.bucket for c in candidates if c.verdict == SAFE}
    timed = {c.bucket for c in candidates if c.verdict == SAFE and c.median_us is not None}
    open_: set[BucketKey] = set()
    for layer in cut:
        real = [layer.bucket(m) for m in layer.ranges if m.hi]
        open_.update(bucket for bucket in real if bucket not in timed)
        # An empty batch goes with the smallest real range.
        empty = [layer.bucket(m) for m in layer.ranges if not m.hi]
        open_.update(b for b in empty if b not in safe or (real and real[0] in open_))
    left: list[dict[str, object]] = []
    for layer in cut:
        p = layer.problem
        ranges = [[m.lo, m.hi] for m in layer.ranges if layer.bucket(m) in open_]
        if ranges:
            named = {key: getattr(p, key) for key in ("format", "activation", "out_dtype")}
            left.append({**named, "n": p.n, "k": p.k, "m": ranges})
    return [c for c in candidates if c.bucket not in open_], left
