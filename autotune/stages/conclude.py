"""From what a probe recorded to verdicts in the ledger, and candidates for the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from ...cache.ledger import Ledger
from ...cache.rows import BucketKey, Candidate, Evidence, Verdict
from ..allowance import NOT_TRIED
from ..entrants import Entrant, Layer
from ..evidence import failures
from ..evidence.recorder import Recorder
from ..plan import Plan
from ..verdict.bounds import Bound, codes, kernel, pool
from ..verdict.buckets import MRange
from ..verdict.rules import INCONCLUSIVE, UNSAFE, Doubt, Judgement, decide


def judge(
    plan: Plan,
    facts: Sequence[Evidence],
    bounds: Mapping[str, Bound],
    doubts: Mapping[str, Doubt],
    reference_line: bool = False,
) -> Judgement:
    """The verdict of one tactic in one bucket; a reference line is measured and never judged.

    What a time budget left out is inconclusive for that reason, unless it is known to be unsafe.
    """
    tried = [f for f in facts if f.regime != NOT_TRIED]
    found = decide(tried, plan.profile, bounds, plan.aim, plan.level.without, doubts)
    if not reference_line:
        why = tuple({str(f.detail["note"]): None for f in facts if f.regime == NOT_TRIED})
        if not why or found.status == UNSAFE:
            return found
        return replace(found, status=INCONCLUSIVE, conditions=(), reasons=why)
    reasons = ("a reference line, never chosen",)
    return replace(found, status="inconclusive", conditions=(), reasons=reasons)


def candidates(
    plan: Plan,
    done: Sequence[tuple[Layer, Sequence[Entrant]]],
    record: Recorder,
    ledger: Ledger,
    doubts: Mapping[str, Doubt],
    earlier: Mapping[tuple[str, str, BucketKey], Sequence[Evidence]] | None = None,
) -> list[Candidate]:
    """A verdict for every tactic that was tried, and a candidate for each backend's best.

    `doubts` are of this run's controls: they say nothing of an entrant whose evidence is an earlier
    run's. `earlier` are failures that earlier runs saw (see `failures`); of an entrant that is
    known they are among its own evidence.
    """
    found = []
    tried = {
        (entrant.name, layer.bucket(m)): entrant
        for layer, entrants in done
        for entrant in entrants
        for m in layer.ranges
    }
    digests, pooled = codes(record.exact), pool(record.exact, plan.confidence)
    for (backend, tactic, bucket), facts in record.take_facts().items():
        entrant = tried[backend, bucket]
        mine = pooled.get(kernel(backend, tactic, bucket, digests), {})
        bounds = {regime: bound.json() for regime, bound in mine.items()}
        its = {} if entrant.known else doubts
        before = [] if entrant.known else list((earlier or {}).get((backend, tactic, bucket), ()))
        judgement = judge(plan, [*facts, *before], mine, its, entrant.reference_line)
        if before and judgement.status == UNSAFE:
            said = failures.reasons(before)
            judgement = replace(judgement, reasons=(*judgement.reasons, *said))
        conditions = tuple(asdict(c) for c in judgement.conditions)
        ledger.add_verdict(
            Verdict(
                run=record.run,
                fingerprint=record.fingerprint(backend),
                backend=backend,
                tactic=tactic,
                bucket=bucket,
                profile=plan.profile.name,
                status=judgement.status,
                conditions=conditions,
                reasons=judgement.reasons,
                bounds=bounds,
            )
        )
        m = MRange(bucket.m_lo, bucket.m_hi)
        if tactic != entrant.winner.get(m, entrant.tactics[m][0]):
            continue
        timing = record.timings.get((backend, tactic, bucket))
        found.append(
            Candidate(
                arch=plan.target.device.arch,
                gpu=plan.target.name,
                profile=plan.profile.name,
                bucket=bucket,
                backend=backend,
                tactic=tactic,
                layout=entrant.runner.hello["layout"],
                verdict=judgement.status,
                median_us=timing.median_us if timing else None,
                lo_us=timing.lo_us if timing else None,
                hi_us=timing.hi_us if timing else None,
                launches=judgement.launches,
                problems=judgement.problems,
                width=judgement.width,
                conditions=conditions,
                reasons=judgement.reasons,
                fingerprint=record.fingerprint(backend),
                bounds=bounds,
            )
        )
    return found
