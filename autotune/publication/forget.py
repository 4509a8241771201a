"""Taking back what a probe made known, for a reason that stays in the ledger.

What is taken back answers nothing any more: it is not used again, not judged by, not exported, and
what was published of it is withdrawn, so that it is measured anew. It is not removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...cache import state
from ...cache.ledger import TAKEN_BACK, Ledger
from ...cache.rows import BucketKey, Candidate, Evidence, Finding, FinishedStep, Forgotten
from ...errors import Refused
from ...words import CENSUS, EXACT
from .. import steps
from ..verdict.buckets import MRange
from ..verdict.rules import SAFE
from . import published
from .publish import republish

LONGEST_REASON = 1000
"""Characters of a reason."""

_Place = tuple[str, BucketKey, str | None]
"""A backend, a bucket and a fingerprint."""


@dataclass(frozen=True, slots=True)
class TakenBack:
    """What came of it: the row that the ledger keeps, how many rows of which table it covers, and
    the new generation, None where nothing was published of it."""

    row: Forgotten
    covered: Mapping[str, int]
    generation: int | None


def forget(state_dir: Path, wanted: Forgotten) -> TakenBack:
    """Take back what `wanted` names, as it is there now.

    First it is withdrawn from what is published, then the ledger notes it: ended in between, it can
    be asked for again. Raises Refused where nothing is named, or nothing is there of it, and
    StateError.
    """
    reason = wanted.reason.strip()
    if not reason:
        raise Refused("say why with --reason: it stays in the ledger")
    if not reason.isprintable():
        raise Refused("--reason has characters that cannot be printed; it is to be read by people")
    if len(reason) > LONGEST_REASON:
        raise Refused(f"--reason has {len(reason)} characters; {LONGEST_REASON} are kept at most")
    if not wanted.what:
        raise Refused("say what to take back: --run, --backend, --layer or --finding")
    with Ledger.open(state_dir) as ledger:
        asked = replace(wanted, reason=reason)
        row = (
            _with_evidence(ledger, asked)
            if asked.finding is not None
            else _rows_selected(ledger, asked)
        )
        covered = _covered(ledger, row)
        if not any(covered.values()):
            raise Refused(f"there is nothing of {row.what} in {state_dir} to take back")
        with state.exclusive(state.lock_file(state_dir, "join"), "the publication", wait=60):
            generation = _withdraw(state_dir, ledger, row)
            made = ledger.forget(row)
    return TakenBack(made, covered, generation)


def _rows_selected(ledger: Ledger, asked: Forgotten) -> Forgotten:
    return replace(asked, rows=ledger.last())


def _with_evidence(ledger: Ledger, asked: Forgotten) -> Forgotten:
    """A finding with the evidence that has no other, and the steps that are to be made again."""
    everything = ledger.findings()
    finding = next((each for each in everything if each.id == asked.finding), None)
    if finding is None:
        raise Refused(f"there is no finding {asked.finding}; see fp4tune show --findings")
    if asked.run or asked.backend or asked.n is not None:
        raise Refused("--finding names one finding, and nothing beside it")
    others = [each for each in everything if each.id != finding.id]
    here = {"run": finding.run, "backend": finding.backend, "bucket": finding.bucket}
    evidence = [
        each
        for each in ledger.evidence(**here, tactic=finding.tactic, status="failed")
        if _of(finding, each) and not any(_of(other, each) for other in others)
    ]
    again = {name for each in evidence for name in _steps_of(each)}
    item = (MRange(finding.bucket.m_lo, finding.bucket.m_hi), finding.tactic)
    made = [
        step.id
        for step in ledger.steps(finding.bucket.n, finding.bucket.k)
        if (step.run, step.backend) == (finding.run, finding.backend)
        and step.what in again
        and _is_of(step, item)
    ]
    layers = [
        row.id
        for row in ledger.probed(finding.bucket.n, finding.bucket.k)
        if evidence
        and row.bucket.layer == finding.bucket.layer
        and finding.run in row.detail["entrants"].get(finding.backend, {}).get("runs", ())
    ]
    rows = {
        "finding": [finding.id],
        "evidence": [each.id for each in evidence],
        "step": made,
        "probed": layers,
    }
    return replace(asked, backend=finding.backend, rows=rows)


def _of(finding: Finding, row: Evidence) -> bool:
    """Whether a finding is part of why a row of evidence failed."""
    return (finding.run, finding.where, finding.regime) == (row.run, row.where, row.regime) and (
        finding.data == row.data or row.data == EXACT
    )


def _steps_of(row: Evidence) -> set[str]:
    """The steps that may have written a row."""
    if row.data != EXACT:
        return {steps.family(row.data)}
    if row.regime == CENSUS:
        return {steps.CENSUS}
    return {steps.regime(row.regime)} | ({steps.GRADED} if row.regime == "serial" else set())


def _is_of(step: FinishedStep, item: steps.Item) -> bool:
    return item in steps.items_of(step.detail["items"])


def _covered(ledger: Ledger, row: Forgotten) -> dict[str, int]:
    """How many rows of each table are taken back now that were not before."""
    return {table: ledger.count(table, row) for table in TAKEN_BACK}


def _withdraw(state_dir: Path, ledger: Ledger, row: Forgotten) -> int | None:
    """Publish what stands without what rests on `row`; the new generation, if any."""
    stands = published.usable(state_dir)
    places = _places_of(ledger, row)
    kept = [each for each in stands.candidates if not _rests(each, row, places)]
    if len(kept) == len(stands.candidates):
        return None
    wanted = {each.fingerprint for each in kept}
    environments = [each for each in stands.environments if each.fingerprint in wanted]
    return republish(state_dir, stands, kept, environments)


def _places_of(ledger: Ledger, row: Forgotten) -> set[_Place]:
    """What a run, or a finding, says something of, unless it was measured anew since."""
    if row.finding is not None:
        found = next(each for each in ledger.findings() if each.id == row.finding)
        return {(found.backend, found.bucket, found.fingerprint)}
    if row.run is None:
        return set()
    newest: dict[_Place, str] = {}
    judged: set[_Place] = set()
    for each in ledger.evidence():
        newest[each.backend, each.bucket, each.fingerprint] = each.run
    for verdict in ledger.verdicts(run=row.run):
        judged.add((verdict.backend, verdict.bucket, verdict.fingerprint))
    mine = {place for place, run in newest.items() if run == row.run}
    return mine | {place for place in judged if place not in newest}


def _rests(candidate: Candidate, row: Forgotten, places: set[_Place]) -> bool:
    """Whether a published candidate rests on what is taken back."""
    place = (candidate.backend, candidate.bucket, candidate.fingerprint)
    if row.finding is not None:
        return candidate.verdict != SAFE and place in places
    if row.run is not None and place not in places:
        return False
    b = candidate.bucket
    return row.backend in (None, candidate.backend) and (
        row.n is None or (row.n, row.k) == (b.n, b.k)
    )
