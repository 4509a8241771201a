"""Turns what workers report into rows of the ledger, and keeps the facts that verdicts need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from ..cache.ledger import Ledger
from ..cache.rows import BucketKey, Evidence, Finding, Timing
from ..probes.data import FAMILIES
from ..probes.supervisor import WorkerFailed
from .stats import median, median_interval

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

    def knows(self, backend: str, fingerprint: str) -> None:
        """From now on evidence of `backend` holds for this environment."""
        self._fingerprints[backend] = fingerprint

    def fingerprint(self, backend: str) -> str:
        return self._fingerprints[backend]

    def take_facts(self) -> dict[Key, list[Evidence]]:
        """The evidence since the last call, by what it is about."""
        facts, self._facts = self._facts, {}
        return facts

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
        for key in ("proof", "alpha", "tile_error"):
            if result.get(key):
                detail[key] = result[key]
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
                self._found(backend, tactic, bucket, regime, data, bad)
        elif result.get("not_exercised"):
            status, detail["note"] = "not exercised", result["not_exercised"]
        elif result.get("exempt") and not result["launches"]:
            status, detail["note"] = "not applicable", result["exempt"]
        if result.get("changed_inputs"):
            status = "failed"
            kind = {"kind": "input modified", "tensors": result["changed_inputs"]}
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
    ) -> None:
        """A command that did not finish: a finding, unless the device or its memory explain it."""
        if failure.kind in ("not applicable", "out of memory", "internal"):
            status = "not applicable" if failure.kind == "not applicable" else "skipped"
            self.status(backend, tactic, bucket, regime, data, status, {"note": str(failure)})
            return
        bad = {
            "kind": failure.kind,
            "message": str(failure),
            "doing": failure.doing,
            "log": failure.log[-300:],
        }
        self._found(backend, tactic, bucket, regime, data, bad)
        self.status(backend, tactic, bucket, regime, data, "failed", {"note": str(failure)})

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
        row = Finding(
            run=self.run,
            fingerprint=self._fingerprints[backend],
            backend=backend,
            tactic=tactic,
            bucket=bucket,
            problem={**problem, "m": bad.get("m", bucket.m_hi)},
            kind=str(bad["kind"]),
            regime=regime,
            data=str(bad.get("data", data)),
            seed=int(bad.get("seed", self._seed)),
            condition=asdict(condition) if condition else None,
            detail=_plain({k: v for k, v in bad.items() if k not in ("kind", "m", "seed", "data")}),
        )
        self._ledger.add_finding(row)
        self.findings.append(row)


def _plain(value: Any) -> Any:
    """`value` with numbers that JSON has no spelling for (NaN, infinity) as text."""
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
