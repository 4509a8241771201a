"""Audits in the ledger: what static inspection said of modules, and what follows for verdicts.

A module that fails the audit is not safe, whatever a run showed. ``clean`` changes nothing, since a
wait that is present proves nothing, and ``unknown`` is said and changes nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ...cache import fingerprint, state
from ...cache.errors import StateError
from ...cache.ledger import Ledger
from ...cache.rows import Audit, Candidate, Environment
from ...probes import audit as auditing
from ...probes.audit import CLEAN, FLAGGED, UNKNOWN, Report

RULES = 1
"""Raised whenever the same bytes would be judged differently: older audits then do not count."""
SECONDS = 300.0
"""What the audit of one probe may take, over all modules."""

Say = Callable[[str], None]


def content(path: str | Path) -> str:
    """What an audit of this file holds for: its bytes, its build file's, and our rules (hex)."""
    sha = hashlib.sha256(f"{RULES}\n".encode())
    for each in (Path(path), Path(path).parent / "build.ninja"):
        try:
            with open(each, "rb") as file:
                while block := file.read(1 << 20):
                    sha.update(block)
        except OSError:
            sha.update(b"\0")
    return sha.hexdigest()


def row(report: Report, backend: str | None = None) -> Audit:
    """A report as the ledger keeps it; `backend` loads it where the module does not say."""
    (found,) = auditing.audit_findings([report], backend)
    path = found["path"]
    return Audit(
        content=content(path) if path else None,
        module=found["module"],
        path=str(Path(path).absolute()) if path else None,
        sm=report.sm,
        verdict=found["verdict"],
        authority=found["authority"],
        pdl=found["pdl"],
        backend=found["backend"],
        digest=found["digest"],
        remedy=found["remedy"],
        evidence=tuple(found["evidence"]),
    )


def of_files(
    files: Mapping[str, Sequence[str]],
    sm: int | None,
    ledger: Ledger,
    say: Say = lambda text: None,
    seconds: float = SECONDS,
) -> dict[str, list[Audit]]:
    """Audit the compiled files of each backend; by backend, those that hold code for `sm`.

    What the ledger knows of the same bytes is not disassembled again. When `seconds` are over,
    the rest is ``unknown``, and asked again next time.
    """
    deadline = time.monotonic() + seconds
    found: dict[str, list[Audit]] = {}
    for backend, paths in files.items():
        for path in paths:
            if Path(path).suffix not in (".so", ".o", ".cubin") or not auditing.holds_code(path):
                continue
            one = _of_file(path, backend, sm, ledger, deadline - time.monotonic(), say)
            if one is not None:
                found.setdefault(backend, []).append(one)
    return found


def _of_file(
    path: str, backend: str, sm: int | None, ledger: Ledger, seconds: float, say: Say
) -> Audit | None:
    """None where the module has no code for `sm`: such a GPU does not load it."""
    key = content(path)
    known = [a for a in ledger.audits(key) if a.sm == sm and a.verdict != UNKNOWN]
    if known:
        return replace(known[-1], backend=backend, path=path)
    if seconds <= 0:
        why = ("not audited: the time for this probe's audits was over",)
        return Audit(
            key, Path(path).name, path, sm, UNKNOWN, "none", UNKNOWN, backend, evidence=why
        )
    say(f"auditing {Path(path).name}")
    (report,) = auditing.audit((Path(path),), sm, seconds=seconds)
    if report.authority == "sass" and not report.kernels:
        return None
    made = replace(row(report, backend), backend=backend)
    ledger.add_audit(made)
    return made


class Auditor:
    """Audits beside a probe: started when everything is built, asked when verdicts are due."""

    def __init__(
        self, files: Mapping[str, Sequence[str]], sm: int | None, ledger: Ledger, say: Say
    ) -> None:
        self._pool = ThreadPoolExecutor(1, "fp4tune-audit")
        self._future = self._pool.submit(of_files, files, sm, ledger, say)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def result(self) -> dict[str, list[Audit]]:
        """By backend; waits until all are judged."""
        return self._future.result()


def sentence(audit: Audit) -> str:
    """An audit's verdict and the last of its evidence, which decided."""
    why = audit.evidence[-1] if audit.evidence else "nothing is known of it"
    return f"{audit.module} is {audit.verdict}: {why}"


def remarks(audits: Iterable[Audit]) -> dict[str, str]:
    """What is to be said by backend: flagged and unknown modules. Clean ones need no word."""
    said: dict[str, str] = {}
    for audit in sorted(audits, key=lambda a: a.verdict != FLAGGED):
        if audit.verdict != CLEAN:
            said.setdefault(audit.backend or audit.module, sentence(audit))
    return said


def condemned(
    candidates: Sequence[Candidate],
    environments: Sequence[Environment],
    audits: Iterable[Audit],
) -> list[Candidate]:
    """Candidates whose environment holds a flagged module as ``unsafe``; the rest as they are.

    A module is an environment's if its machine code is that of the environment, or the file the
    audit saw is still the very file that the environment was measured with.
    """
    flagged = [a for a in audits if a.verdict == FLAGGED]
    bad: dict[str, Audit] = {}
    for environment in environments:
        for audit in flagged:
            if _holds(environment, audit):
                bad.setdefault(environment.fingerprint, audit)
    return [c if c.fingerprint not in bad else _unsafe(c, bad[c.fingerprint]) for c in candidates]


def _unsafe(candidate: Candidate, audit: Audit) -> Candidate:
    reason = f"audit: {sentence(audit)}"
    # Another unsafe reason may stand already; what was only open or conditional no longer matters.
    others = candidate.reasons if candidate.verdict == "unsafe" else ()
    if any(other.startswith("audit:") for other in others):
        return candidate
    return replace(candidate, verdict="unsafe", rank=None, conditions=(), reasons=(reason, *others))


def _holds(environment: Environment, audit: Audit) -> bool:
    if audit.sm is not None and environment.arch != f"sm{audit.sm}":
        return False
    if audit.digest is not None and environment.facts.get("code") == audit.digest:
        return True
    if audit.path is None:
        return False
    try:
        now = fingerprint.stamp(audit.path)
    except OSError:
        return False
    return now in environment.stamps and content(audit.path) == audit.content


def remember(reports: Sequence[Report], state_dir: Path | None = None) -> list[str]:
    """Write reports to a ledger, and publish what they take away; what there is to say of it.

    The ledger is that of `state_dir`, made if need be; without one, that of the place writers use,
    if there is any. An audit is worth printing where nothing can be written, so that is said and
    no error.
    """
    from ..publication.publish import publish_audits

    try:
        place = state.directory(state_dir)
        if not reports or (state_dir is None and not (Path(place) / state.LEDGER).exists()):
            return []
        rows = [row(report) for report in reports]
        with Ledger.open(place) as ledger:
            ledger.add_all(rows)
        generation = publish_audits(rows, Path(place))
    except StateError as error:
        return [f"the audit was not stored: {error}"]
    if generation is None:
        return []
    return [f"choices of a flagged module were taken back; stored as generation {generation}"]
