"""From what a probe recorded to verdicts in the ledger, and candidates for the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from ...cache.ledger import Ledger
from ...cache.rows import BucketKey, Candidate, Evidence, Verdict, Where
from ...machine.devices import Target
from ...words import EVERY_M
from ..evidence import earlier_failures
from ..evidence.recorder import Recorder
from ..layer import Entrant, ProbedLayer
from ..verdict.bounds import codes, kernel, pool
from ..verdict.buckets import MRange
from ..verdict.rules import SAFE, UNSAFE, Doubts, Judgement, Rules, judge

Layers = Sequence[tuple[ProbedLayer, Sequence[Entrant]]]


@dataclass(frozen=True, slots=True)
class Grounds:
    """What verdicts rest on beside this run's evidence.

    `doubts` are of this run's controls: they say nothing of an entrant whose evidence is an earlier
    run's. `earlier` are failures that earlier runs saw; of an entrant that is known they are among
    its own evidence.
    """

    target: Target
    rules: Rules
    confidence: float
    doubts: Doubts
    earlier: Mapping[Where, Sequence[Evidence]]


@dataclass(frozen=True, slots=True)
class Concluded:
    """`candidates` are those to publish. `left` is what is left of layers in which the budget
    ended: their m ranges without a proven candidate."""

    candidates: list[Candidate]
    left: list[dict[str, object]]


def conclude(
    layers: Layers,
    cut: Sequence[ProbedLayer],
    record: Recorder,
    ledger: Ledger,
    grounds: Grounds,
) -> Concluded:
    """Verdicts, and what is published of them; `cut` are layers in which the budget ended, or
    before them."""
    return _without_unfinished(_judge_all(layers, record, ledger, grounds), cut)


def _judge_all(
    layers: Layers, record: Recorder, ledger: Ledger, grounds: Grounds
) -> list[Candidate]:
    """A verdict for every tactic that was tried, and a candidate for each backend's best."""
    found = []
    tried = {
        (entrant.name, layer.bucket(m)): entrant
        for layer, entrants in layers
        for entrant in entrants
        for m in layer.ranges
    }
    digests, pooled = codes(record.exact), pool(record.exact, grounds.confidence)
    for where, facts in record.take_facts().items():
        entrant = tried[where.backend, where.bucket]
        bounds = dict(pooled.get(kernel(where, digests), {}))
        shown = {regime: bound.json() for regime, bound in bounds.items() if regime != EVERY_M}
        if EVERY_M in bounds and (ms := _ms_run(facts)):  # here, not in another of its buckets
            shown[EVERY_M] = {**bounds[EVERY_M].json(), "ms": ms}
        doubts = {} if entrant.known else grounds.doubts.of(where.bucket.groups)
        before = [] if entrant.known else list(grounds.earlier.get(where, ()))
        judged = judge([*facts, *before], grounds.rules, bounds, doubts, entrant.reference_line)
        if before and judged.status == UNSAFE:
            said = earlier_failures.reasons(before)
            judged = replace(judged, reasons=(*judged.reasons, *said))
        verdict = Verdict(
            run=record.run,
            fingerprint=record.fingerprint(where.backend),
            backend=where.backend,
            tactic=where.tactic,
            bucket=where.bucket,
            profile=grounds.rules.profile.name,
            status=judged.status,
            conditions=tuple(asdict(c) for c in judged.conditions),
            reasons=judged.reasons,
            bounds=shown,
        )
        ledger.add_verdict(verdict)
        m = MRange(where.bucket.m_lo, where.bucket.m_hi)
        if where.tactic == entrant.winner.get(m, entrant.tactics[m][0]):
            layout = entrant.runner.hello["layout"]
            found.append(_candidate(verdict, judged, layout, grounds.target, record))
    return found


def _ms_run(facts: Sequence[Evidence]) -> int:
    """How many m of the bucket were run where each is to be: of each there is one problem."""
    mine = [fact for fact in facts if fact.regime == EVERY_M and fact.status == "passed"]
    return max((fact.problems for fact in mine), default=0)


def _candidate(
    verdict: Verdict, judged: Judgement, layout: str, target: Target, record: Recorder
) -> Candidate:
    timing = record.timings.get(verdict.where)
    return Candidate(
        arch=target.device.arch,
        gpu=target.name,
        profile=verdict.profile,
        bucket=verdict.bucket,
        backend=verdict.backend,
        tactic=verdict.tactic,
        layout=layout,
        verdict=verdict.status,
        median_us=timing.median_us if timing else None,
        lo_us=timing.lo_us if timing else None,
        hi_us=timing.hi_us if timing else None,
        launches=judged.launches,
        problems=judged.problems,
        width=judged.width,
        conditions=verdict.conditions,
        reasons=verdict.reasons,
        fingerprint=verdict.fingerprint,
        bounds=verdict.bounds,
    )


def _without_unfinished(candidates: Sequence[Candidate], cut: Sequence[ProbedLayer]) -> Concluded:
    """Nothing is published of a range that is left, so that what stood there before goes on
    standing."""
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
            left.append({**named, "groups": p.groups, "n": p.n, "k": p.k, "m": ranges})
    return Concluded([c for c in candidates if c.bucket not in open_], left)
