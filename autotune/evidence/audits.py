"""Audits as the ledger keeps them: what static inspection said of modules, and how it is told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ...cache.rows import Audit
from ...machine import files
from ...probes import audit as auditing
from ...probes.audit import CLEAN, FLAGGED, AuditReport

RULES = 2
"""Raised whenever the same bytes would be judged differently: older audits then do not count."""


def content(path: str | Path) -> str:
    """What an audit of this file holds for: its bytes, its build file's, and our rules (hex)."""
    sha = hashlib.sha256(f"{RULES}\n".encode())
    for each in (Path(path), Path(path).parent / "build.ninja"):
        try:
            with files.opened(each) as file:
                while block := file.read(1 << 20):
                    sha.update(block)
        except OSError:
            sha.update(b"\0")
    return sha.hexdigest()


def row(report: AuditReport, backend: str | None = None) -> Audit:
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


def audit_sentence(audit: Audit) -> str:
    """An audit's verdict and the last of its evidence, which decided."""
    why = audit.evidence[-1] if audit.evidence else "nothing is known of it"
    return f"{audit.module} is {audit.verdict}: {why}"


def remarks(audits: Iterable[Audit]) -> dict[str, str]:
    """What is to be said by backend: flagged, doubtful and unknown modules. Of those in which no
    fault was seen nothing is said."""
    said: dict[str, str] = {}
    for audit in sorted(audits, key=lambda a: a.verdict != FLAGGED):
        if audit.verdict != CLEAN:
            said.setdefault(audit.backend or audit.module, audit_sentence(audit))
    return said
