"""Turns what workers report into rows of the ledger, and keeps the facts that verdicts need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite
from typing import Any

from ...cache.ledger import Ledger
from ...cache.rows import Audit, BucketKey, Evidence, Finding, Timing
from ...probes.census import REGIME as CENSUS
from ...probes.check import diagnosis
from ...probes.data import FAMILIES
from ...probes.worker.supervisor import WorkerFailed
from ..verdict.bounds import EXACT
from ..verdict.stats import median, median_interval

AUDIT = "audit"
"""Stands where a regime does in what was found without a launch, in machine code."""
FLAGGED = "flagged"
"""The kind of such a finding."""
_COLUMNS = ("kind", "m", "seed", "data", "launch")
"""What of a failure has a column of its own."""
Key = tuple[str, str, BucketKey]
"""Backend, tactic, bucket."""


class Recorder:
    """Writes one run's evidence as it comes."""

    def __init__(self, ledger: Ledger, run: str, seed: int) -> None:
        self._ledger = ledger
        self.run = run
        self._seed = seed
        self._fingerprints: dict[str, str] = {}
        self._facts: dict[Key, list[Evidence]] = {}
        self.timings: dict[Key, Timing] = {}
        self.findings: list[Finding] = []
        self.exact: list[Evidence] = []
        """All evidence on exact problems: what failure rates are bounded by."""
        self._audited: dict[tuple[Key, str], tuple[list[Evidence], list[Finding]]] = {}
        """By place and module: what earlier runs kept of a flagged module."""

    def knows(self, backend: str, fingerprint: str) -> None:
        """From now on evidence of `backend` holds for this environment."""
        self._fingerprints[backend] = fingerprint

    def fingerprint(self, backend: str) -> str:
        return self._fingerprints[backend]

    def facts(self, key: Key) -> tuple[Evidence, ...]:
        """The evidence of one tactic in one bucket so far."""
        return tuple(self._facts.get(key, ()))

    def take_facts(self) -> dict[Key, list[Evidence]]:
        """The evidence since the last call, by what it is about."""
        facts, self._facts = self._facts, {}
        return facts

    def recall(
        self, rows: Sequence[Evidence], findings: Sequence[Finding], timings: Sequence[Timing]
    ) -> None:
        """Take rows of earlier runs as this run's. They are stored, and are not stored again.

        What an audit said is kept aside, until `audited` says it again.
        """
        for row in rows:
            key = row.backend, row.tactic, row.bucket
            if row.regime == AUDIT:
                self._kept(key, row.detail)[0].append(row)
                continue
            if row.data == EXACT:
                self.exact.append(row)
            self._facts.setdefault(key, []).append(row)
        for found in findings:
            if found.regime == AUDIT:
                key = found.backend, found.tactic, found.bucket
                self._kept(key, found.detail)[1].append(found)
            else:
                self.findings.append(found)
        for timing in timings:
            self.timings[timing.backend, timing.tactic, timing.bucket] = timing

    def _kept(self, key: Key, detail: Mapping[str, Any]) -> tuple[list[Evidence], list[Finding]]:
        return self._audited.setdefault((key, str(detail.get("module"))), ([], []))

    def status(
        self,
        backend: str,
        tactic: str,
        bucket: BucketKey,
        regime: str,
        data: str,
        status: str,
        detail: Mapping[str, Any] | None = None,
        launches: int = 0,
        problems: int = 0,
        width: int | None = None,
        seconds: float = 0.0,
    ) -> None:
        """One row of evidence."""
        row = Evidence(
            run=self.run,
            fingerprint=self._fingerprints[backend],
            backend=backend,
            tactic=tactic,
            bucket=bucket,
            regime=regime,
            data=data,
            status=status,
            launches=launches,
            problems=problems,
            width=width,
            seconds=seconds,
            detail=_plain(dict(detail or {})),
        )
        self._ledger.add_evidence(row)
        if data == EXACT:
            self.exact.append(row)
        self._facts.setdefault((backend, tactic, bucket), []).append(row)

    def result(
        self,
        backend: str,
        tactic: str,
        bucket: BucketKey,
        regime: str,
        data: str,
        result: Mapping[str, Any],
        width: int | None,
        seconds: float = 0.0,
    ) -> str:
        """What a worker reported of one item, with a finding for every way it went wrong.

        Returns the status recorded.
        """
        detail: dict[str, Any] = {}
        for key in ("proof", "alpha", "roundings", "tile_error", "bad_problems"):
            if result.get(key):
                detail[key] = result[key]
        for graded in result.get("graded", ()):
            detail.setdefault("graded", []).append(graded)
            self._found(backend, tactic, bucket, regime, data, graded)
        status = "passed"
        error = result.get("error")
        if error and error["kind"] == "out of memory":
            status, detail["note"] = "skipped", error["message"]
        elif error:
            status = "failed"
            self._found(backend, tactic, bucket, regime, data, {"kind": "error", **error})
        elif result["bad"]:
            status = "failed"
            detail["bad_launches"] = result.get("bad_launches")
            for bad in result["bad"]:
                if result.get("changed_inputs"):
                    bad = {**bad, "inputs_changed": result["changed_inputs"]}
                self._found(backend, tactic, bucket, regime, data, bad)
        elif result.get("exempt") and not result["launches"]:
            status, detail["note"] = "not applicable", result["exempt"]
        elif result.get("not_exercised"):
            status, detail["note"] = "not exercised", result["not_exercised"]
        if result.get("changed_inputs"):
            status = "failed"
            known = result.get("modified") or result.get("example") or {}
            kind = {**known, "kind": "input modified", "tensors": result["changed_inputs"]}
            self._found(backend, tactic, bucket, regime, data, kind)
        self.status(
            backend,
            tactic,
            bucket,
            regime,
            data,
            status,
            detail,
            result["launches"],
            result["problems"],
            width,
            seconds,
        )
        return status

    def failure(
        self,
        backend: str,
        tactic: str,
        bucket: BucketKey,
        regime: str,
        data: str,
        failure: WorkerFailed,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        """A command that did not finish: a finding, unless the device or its memory explain it.

        `asked` is what the worker was asked, to ask it again.
        """
        if failure.kind in ("not applicable", "out of memory", "internal"):
            status = "not applicable" if failure.kind == "not applicable" else "skipped"
            self.status(backend, tactic, bucket, regime, data, status, {"note": str(failure)})
            return
        bad: dict[str, Any] = {
            "kind": failure.kind,
            "message": str(failure),
            "doing": failure.doing,
            "log": failure.log[-300:],
        }
        if asked:
            bad["asked"] = dict(asked)
        self._found(backend, tactic, bucket, regime, data, bad)
        self.status(backend, tactic, bucket, regime, data, "failed", {"note": str(failure)})

    def census(
        self, backend: str, tactic: str, bucket: BucketKey, result: Mapping[str, Any]
    ) -> None:
        """What really ran: ``bad`` is a finding each, ``detail`` the kernels, ``seen`` if any."""
        for bad in result["bad"]:
            self._found(backend, tactic, bucket, CENSUS, EXACT, bad)
        status = "failed" if result["bad"] else "passed" if result["seen"] else "not applicable"
        self.status(backend, tactic, bucket, CENSUS, EXACT, status, result["detail"])

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
        for key in [key for key in self._facts if key[0] == backend]:
            _, tactic, bucket = key
            rows, findings = self._audited.get((key, str(audit.module)), ([], []))
            if rows:
                self._facts[key] += rows
                self.exact += rows
                self.findings += findings
                continue
            self._found(backend, tactic, bucket, AUDIT, EXACT, flagged)
            detail = {"module": audit.module, "note": flagged["message"]}
            self.status(backend, tactic, bucket, AUDIT, EXACT, "failed", detail)

    def timing(
        self,
        backend: str,
        tactic: str,
        bucket: BucketKey,
        samples: Sequence[float],
        host_us: float | None,
        device: Mapping[str, Any],
    ) -> None:
        """Time per launch in microseconds, over interleaved samples; `device` is its health."""
        low, high = median_interval(samples)
        row = Timing(
            run=self.run,
            fingerprint=self._fingerprints[backend],
            backend=backend,
            tactic=tactic,
            bucket=bucket,
            median_us=median(samples),
            lo_us=low,
            hi_us=high,
            samples=len(samples),
            host_us=host_us,
            detail=_plain(dict(device)),
        )
        self._ledger.add_timing(row)
        self.timings[backend, tactic, bucket] = row

    def _found(
        self,
        backend: str,
        tactic: str,
        bucket: BucketKey,
        regime: str,
        data: str,
        bad: Mapping[str, Any],
    ) -> None:
        condition = FAMILIES[data].condition if data in FAMILIES else None
        problem = {
            key: getattr(bucket, key)
            for key in ("format", "activation", "out_dtype", "groups", "n", "k")
        }
        m = int(bad.get("m", bucket.m_hi))
        launch = bad.get("launch")
        said = diagnosis.diagnose(
            diagnosis.seen(
                bad,
                regime,
                str(bad.get("data", data)),
                (m, bucket.n, bucket.k),
                *self._judged(backend, tactic, bucket),
            )
        )
        row = Finding(
            run=self.run,
            fingerprint=self._fingerprints[backend],
            backend=backend,
            tactic=tactic,
            bucket=bucket,
            problem={**problem, "m": m},
            kind=str(bad["kind"]),
            regime=regime,
            data=str(bad.get("data", data)),
            seed=int(bad.get("seed", self._seed)),
            launch=int(launch) if launch else None,
            condition=asdict(condition) if condition else None,
            detail=_plain(
                {**{k: v for k, v in bad.items() if k not in _COLUMNS}, "diagnosis": said}
            ),
        )
        self.findings.append(replace(row, id=self._ledger.add_finding(row)))

    def _judged(
        self, backend: str, tactic: str, bucket: BucketKey
    ) -> tuple[frozenset[str], frozenset[str]]:
        """Regimes in which this tactic passed and failed in this bucket so far."""
        facts = self._facts.get((backend, tactic, bucket), ())
        exact = [f for f in facts if f.data == EXACT]
        failed = frozenset(f.regime for f in exact if f.status == "failed")
        return frozenset(f.regime for f in exact if f.status == "passed") - failed, failed


def _plain(value: Any) -> Any:
    """`value` with numbers that JSON has no spelling for (NaN, infinity) as text."""
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
