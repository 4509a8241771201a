"""What workers report as rows of the ledger, and the facts that verdicts need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...cache.codec import plain
from ...cache.ledger import Ledger
from ...cache.rows import Audit, BucketKey, Evidence, Finding, FinishedStep, Timing, Under, Where
from ...probes.check import diagnosis
from ...probes.data import FAMILIES
from ...probes.grouped.families import ODD_ROUTING
from ...probes.worker.supervisor import WorkerFailed
from ...words import AUDIT, CENSUS, EXACT
from ..verdict.statistics import median, median_interval

FLAGGED = "flagged"
"""The kind of a finding that an audit made."""
_CONDITIONS = {
    **{name: family.condition for name, family in FAMILIES.items()},
    **{name: law.condition for name, law in ODD_ROUTING.items()},
}
_KEPT = ("proof", "alpha", "roundings", "tile_error", "accumulation", "bad_problems", "stages")
"""What of a result its evidence keeps, where there is any."""
_COLUMNS = ("kind", "m", "seed", "data", "launch")
"""What of a failure has a column of its own."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What stands behind a row of evidence: checked launches, different problems among them, the
    width of accumulator they were drawn for in bits, and wall seconds."""

    launches: int = 0
    problems: int = 0
    width: int | None = None
    seconds: float = 0.0


NOTHING = Tally()

UNREACHED = "nothing was launched in the time that there was"
"""A pass has launches."""


class Recorder:
    """Writes one run's evidence as it comes."""

    def __init__(self, ledger: Ledger, run: str, seed: int) -> None:
        self._ledger = ledger
        self.run = run
        self._seed = seed
        self._fingerprints: dict[str, str] = {}
        self._facts: dict[Where, list[Evidence]] = {}
        self.timings: dict[Where, Timing] = {}
        self.findings: list[Finding] = []
        self.exact: list[Evidence] = []
        """All evidence on exact problems: what failure rates are bounded by."""
        self._audited: dict[tuple[Where, str], tuple[list[Evidence], list[Finding]]] = {}
        """By place and module: what earlier runs kept of a flagged module."""

    def knows(self, backend: str, fingerprint: str) -> None:
        """From now on evidence of `backend` holds for this environment."""
        self._fingerprints[backend] = fingerprint

    def fingerprint(self, backend: str) -> str:
        return self._fingerprints[backend]

    def facts(self, where: Where) -> tuple[Evidence, ...]:
        """The evidence of one tactic in one bucket so far."""
        return tuple(self._facts.get(where, ()))

    def take_facts(self) -> dict[Where, list[Evidence]]:
        """The evidence since the last call, by what it is of."""
        facts, self._facts = self._facts, {}
        return facts

    def recall(
        self, rows: Sequence[Evidence], findings: Sequence[Finding], timings: Sequence[Timing]
    ) -> None:
        """Take rows of earlier runs as this run's. They are stored, and are not stored again.

        What an audit said is kept aside, until `audited` says it again.
        """
        for row in rows:
            if row.regime == AUDIT:
                self._kept(row.where, row.detail)[0].append(row)
                continue
            if row.data == EXACT:
                self.exact.append(row)
            self._facts.setdefault(row.where, []).append(row)
        for found in findings:
            if found.regime == AUDIT:
                self._kept(found.where, found.detail)[1].append(found)
            else:
                self.findings.append(found)
        for timing in timings:
            self.timings[timing.where] = timing

    def _kept(
        self, where: Where, detail: Mapping[str, Any]
    ) -> tuple[list[Evidence], list[Finding]]:
        return self._audited.setdefault((where, str(detail.get("module"))), ([], []))

    def together(self) -> AbstractContextManager[None]:
        """What is recorded within is committed as one. Nothing slow belongs in it."""
        return self._ledger.together()

    def finished(
        self, backend: str, bucket: BucketKey, what: str, detail: Mapping[str, Any]
    ) -> None:
        """The row that says that a step is finished; `bucket` spans every m of the layer."""
        fingerprint = self._fingerprints[backend]
        self._ledger.add_step(
            FinishedStep(self.run, fingerprint, backend, bucket, what, plain(dict(detail)))
        )

    def passed(self, where: Where, under: Under) -> bool:
        """Whether all that was recorded under these conditions passed."""
        facts = self._facts.get(where, ())
        return {f.status for f in facts if Under(f.regime, f.data) == under} == {"passed"}

    def status(
        self,
        where: Where,
        under: Under,
        status: str,
        detail: Mapping[str, Any] | None = None,
        tally: Tally = NOTHING,
    ) -> None:
        """One row of evidence."""
        row = Evidence(
            run=self.run,
            fingerprint=self._fingerprints[where.backend],
            backend=where.backend,
            tactic=where.tactic,
            bucket=where.bucket,
            regime=under.regime,
            data=under.data,
            status=status,
            detail=plain(dict(detail or {})),
            **asdict(tally),
        )
        self._ledger.add_evidence(row)
        if row.data == EXACT:
            self.exact.append(row)
        self._facts.setdefault(where, []).append(row)

    def result(
        self,
        where: Where,
        under: Under,
        result: Mapping[str, Any],
        width: int | None,
        seconds: float = 0.0,
    ) -> str:
        """What a worker reported of one item, with a finding for every way it went wrong.

        Returns the status recorded.
        """
        detail: dict[str, Any] = {}
        for key in _KEPT:
            if result.get(key):
                detail[key] = result[key]
        for graded in result.get("graded", ()):
            detail.setdefault("graded", []).append(graded)
            self._found(where, under, graded)
        status = "passed"
        error = result.get("error")
        if error and error["kind"] in ("out of memory", "internal"):
            status, detail["note"] = "skipped", error["message"]
        elif error:
            status = "failed"
            self._found(where, under, {"kind": "error", **error})
        elif result["bad"]:
            status = "failed"
            detail["bad_launches"] = result.get("bad_launches")
            for bad in result["bad"]:
                if result.get("changed_inputs"):
                    bad = {**bad, "inputs_changed": result["changed_inputs"]}
                self._found(where, under, bad)
        elif result.get("exempt") and not result["launches"]:
            status, detail["note"] = "not applicable", result["exempt"]
        elif result.get("not_exercised"):
            status, detail["note"] = "not exercised", result["not_exercised"]
        elif not result["launches"]:
            status, detail["note"] = "skipped", UNREACHED
        if result.get("changed_inputs"):
            status = "failed"
            known = result.get("modified") or result.get("example") or {}
            kind = {**known, "kind": "input modified", "tensors": result["changed_inputs"]}
            self._found(where, under, kind)
        tally = Tally(result["launches"], result["problems"], width, seconds)
        self.status(where, under, status, detail, tally)
        return status

    def failure(
        self,
        where: Where,
        under: Under,
        failure: WorkerFailed,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        """A command that did not finish: a finding, unless the device or its memory explain it.

        `asked` is what the worker was asked, to ask it again.
        """
        if failure.kind in ("not applicable", "out of memory", "internal"):
            status = "not applicable" if failure.kind == "not applicable" else "skipped"
            self.status(where, under, status, {"note": str(failure)})
            return
        bad: dict[str, Any] = {
            "kind": failure.kind,
            "message": str(failure),
            "doing": failure.doing,
            "log": failure.log[-300:],
        }
        if asked:
            bad["asked"] = dict(asked)
        self._found(where, under, bad)
        self.status(where, under, "failed", {"note": str(failure)})

    def census(self, where: Where, result: Mapping[str, Any]) -> None:
        """What really ran: ``bad`` is a finding each, ``detail`` the kernels, ``seen`` if any."""
        under = Under(CENSUS)
        for bad in result["bad"]:
            self._found(where, under, bad)
        status = "failed" if result["bad"] else "passed" if result["seen"] else "not applicable"
        self.status(where, under, status, result["detail"])

    def audited(self, backend: str, audit: Audit) -> None:
        """A module of `backend` is flagged: whatever ran since `take_facts` is not safe."""
        flagged = {
            "kind": FLAGGED,
            "message": audit.evidence[-1] if audit.evidence else audit.module,
            "module": audit.module,
            "path": audit.path,
            "authority": audit.authority,
            "evidence": list(audit.evidence),
            "remedy": audit.remedy,
        }
        under = Under(AUDIT)
        for where in [where for where in self._facts if where.backend == backend]:
            rows, findings = self._audited.get((where, str(audit.module)), ([], []))
            if rows:
                self._facts[where] += rows
                self.exact += rows
                self.findings += findings
                continue
            self._found(where, under, flagged)
            detail = {"module": audit.module, "note": flagged["message"]}
            self.status(where, under, "failed", detail)

    def timing(
        self,
        where: Where,
        samples: Sequence[float],
        host_us: float | None,
        device: Mapping[str, Any],
    ) -> None:
        """Time per launch in microseconds, over interleaved samples; `device` is its health."""
        low, high = median_interval(samples)
        row = Timing(
            run=self.run,
            fingerprint=self._fingerprints[where.backend],
            backend=where.backend,
            tactic=where.tactic,
            bucket=where.bucket,
            median_us=median(samples),
            lo_us=low,
            hi_us=high,
            samples=len(samples),
            host_us=host_us,
            detail=plain(dict(device)),
        )
        self._ledger.add_timing(row)
        self.timings[where] = row

    def _found(self, where: Where, under: Under, bad: Mapping[str, Any]) -> None:
        condition = _CONDITIONS.get(under.data)
        bucket = where.bucket
        m = int(bad.get("m", bucket.m_hi))
        launch = bad.get("launch")
        data = str(bad.get("data", under.data))
        # Rows out of routed experts are as long as rows in.
        shape = (m, bucket.k if bucket.groups > 1 else bucket.n, bucket.k)
        seen = diagnosis.seen(bad, under.regime, data, shape, *self._judged(where))
        row = Finding(
            run=self.run,
            fingerprint=self._fingerprints[where.backend],
            backend=where.backend,
            tactic=where.tactic,
            bucket=bucket,
            problem={**asdict(bucket.layer), "m": m},
            kind=str(bad["kind"]),
            regime=under.regime,
            data=data,
            seed=int(bad.get("seed", self._seed)),
            launch=int(launch) if launch else None,
            condition=asdict(condition) if condition else None,
            detail=plain(
                {
                    **{k: v for k, v in bad.items() if k not in _COLUMNS},
                    "diagnosis": diagnosis.diagnose(seen),
                }
            ),
        )
        self.findings.append(replace(row, id=self._ledger.add_finding(row)))

    def _judged(self, where: Where) -> tuple[frozenset[str], frozenset[str]]:
        """Regimes in which this tactic passed and failed in this bucket so far."""
        exact = [f for f in self._facts.get(where, ()) if f.data == EXACT]
        failed = frozenset(f.regime for f in exact if f.status == "failed")
        return frozenset(f.regime for f in exact if f.status == "passed") - failed, failed
