"""Candidates whose module an audit flags: unsafe, whatever a run showed.

``clean`` changes nothing, since a wait that is present proves nothing, and ``unknown`` is said and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ...cache import fingerprint
from ...cache.rows import Audit, Candidate, Environment
from ...probes.audit import FLAGGED
from ..evidence.audits import audit_sentence, content


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
    reason = f"audit: {audit_sentence(audit)}"
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
