"""The audit beside a probe: static inspection of what its backends have compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...cache.ledger import Ledger
from ...cache.rows import Audit
from ...probes import audit as auditing
from ...probes.audit import UNKNOWN
from ..evidence.audits import content, row

SECONDS = 300.0
"""What the audit of one probe may take, over all modules."""

Say = Callable[[str], None]


def audit(
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
            if not auditing.has_library_name(Path(path).name) or not auditing.holds_code(path):
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
