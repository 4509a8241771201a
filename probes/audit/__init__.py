"""Static inspection of compiled kernels, without a GPU: is a module's machine code safe to launch
early? `audit` finds and judges modules; `audit_findings` is what of it the ledger needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...machine import codedigest
from . import barrier, launch, sources
from .disassemble import SECONDS, TOOL, Progress, examine, holds_code
from .judge import CLEAN, FIRST_SM, FLAGGED, UNKNOWN, Barrier, Module, Report, decide, remedy
from .sources import Found

__all__ = [
    "CLEAN",
    "FLAGGED",
    "UNKNOWN",
    "Module",
    "Report",
    "audit",
    "audit_findings",
    "holds_code",
]


def audit(
    paths: Sequence[Path] = (),
    sm: int | None = None,
    progress: Progress | None = None,
    seconds: float = SECONDS,
) -> list[Report]:
    """Judge the FP4 GEMM modules in `paths`, or those an engine would load in this interpreter.

    sm: only code that this SM runs, e.g. 120; None: all there is. seconds: for each file.
    Raises Refused where there is nothing to audit at a path.
    """
    with sources.modules(paths, sm) as found:
        return [_report(each, progress, seconds) for each in found]


def _report(found: Found, progress: Progress | None, seconds: float) -> Report:
    module, build = found.module, found.build
    path = Path(module.path) if module.path else None
    code = examine(path, found.sm, progress, seconds) if path else None
    launches: list[launch.Launch] = []
    waits: tuple[str, ...] = ()
    if path:
        launches.append(launch.of_host_code(path))
        launches.append(launch.of_triton(path))
    if build:
        own = launch.of_sources(build.sources, build.own)
        launches.append(own.launch)
        waits = own.waits
    unbuilt = code is None or (not code.read and _no_tools())
    asked = None
    if unbuilt and build and found.flags_known and found.sm:
        asked = barrier.of(build, found.sm)
    if found.problem:
        asked = Barrier(None, "none", found.problem)
    report = decide(
        module,
        code,
        launch.combined(launches),
        build.flags if build and found.flags_known else None,
        asked,
        waits,
        found.sm,
    )
    if report.verdict == FLAGGED and build and module.kind in ("jit", "spec"):
        sm = found.sm or max(
            (k.sm for k in (code.kernels if code else ()) if k.sm >= FIRST_SM), default=0
        )
        report = replace(report, remedy=remedy(module, barrier.flag_works(build, sm)))
    return report


def _no_tools() -> bool:
    return codedigest.disassembler() is None or codedigest.disassembler(TOOL) is None


def audit_findings(reports: Iterable[Report], backend: str | None = None) -> list[dict[str, Any]]:
    """What the ledger needs of each report, as plain JSON data.

    backend: whose findings, for modules that do not say by their name which backend loads them.
    ``verdict`` is ``flagged``, ``clean`` or ``unknown``: a backend with a flagged module is not
    safe, whatever a run showed; ``clean`` and ``unknown`` prove nothing. ``digest`` is
    `codedigest.of` that file: evidence holds for that code.
    """
    return [
        {
            "kind": "audit",
            "backend": report.module.backend or backend,
            "module": report.module.name,
            "path": report.module.path,
            "digest": report.digest,
            "verdict": report.verdict,
            "authority": report.authority,
            "pdl": report.pdl,
            "evidence": list(report.evidence),
            "remedy": report.remedy,
        }
        for report in reports
    ]
