"""Static inspection of compiled kernels, without a GPU: is a module's machine code safe to launch
early? `audit` finds and judges modules; `audit_findings` is what of it the ledger needs.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...machine import codedigest
from . import barrier, launch, sources
from .disassemble import (
    SECONDS,
    TOOL,
    MachineCode,
    Progress,
    ReadLimits,
    cores,
    holds_code,
    machine_code_of,
)
from .install import FoundModule
from .judge import (
    CLEAN,
    DOUBTFUL,
    FIRST_SM,
    FLAGGED,
    UNKNOWN,
    AuditEvidence,
    AuditReport,
    BarrierTrial,
    GpuModule,
    decide,
    remedy,
)
from .memory import tidy
from .sources import has_library_name

__all__ = [
    "CLEAN",
    "DOUBTFUL",
    "FLAGGED",
    "UNKNOWN",
    "AuditOptions",
    "AuditReport",
    "GpuModule",
    "audit",
    "audit_findings",
    "audits",
    "has_library_name",
    "holds_code",
]


def audit(
    paths: Sequence[Path] = (),
    sm: int | None = None,
    progress: Progress | None = None,
    seconds: float = SECONDS,
) -> list[AuditReport]:
    """All of `audits`."""
    return list(audits(paths, AuditOptions(sm, progress, seconds)))


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """sm: only code that this SM runs, e.g. 120; None: all there is. seconds: for each file.
    match: a regular expression that module names or paths must contain. jobs: disassemblers at
    once; None: as many as cores and memory allow."""

    sm: int | None = None
    progress: Progress | None = None
    seconds: float = SECONDS
    match: str | None = None
    jobs: int | None = None


def audits(paths: Sequence[Path], options: AuditOptions) -> Iterator[AuditReport]:
    """Judge the modules in `paths`, or the FP4 GEMM modules an engine would load in this
    interpreter, one by one as they are found.

    A path with nothing to audit gives a report that says so, and the others are judged.
    """
    wanted = re.compile(options.match) if options.match else None
    with sources.modules(paths, options.sm) as found:
        named = (
            each
            for each in found
            if wanted is None or wanted.search(f"{each.module.name} {each.module.path or ''}")
        )
        yield from _several(named, options)
    tidy()


def _several(found: Iterator[FoundModule], options: AuditOptions) -> Iterator[AuditReport]:
    """Their reports in order, some files ahead read while one is waited for."""
    jobs = options.jobs or cores()
    with ThreadPoolExecutor(jobs) as pool:
        ahead: deque[Future[AuditReport]] = deque()
        try:
            for each in found:
                ahead.append(pool.submit(_safely, each, options))
                if len(ahead) > 2 * jobs:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _safely(found: FoundModule, options: AuditOptions) -> AuditReport:
    """Its report; of a file that the audit itself fails on, that it is unknown."""
    try:
        return _report(found, options)
    except Exception as error:
        why = f"the audit of it failed: {type(error).__name__}: {error}"
        code = MachineCode(problem=why, read=False)
        return decide(found.module, AuditEvidence(code, launch.PdlUse(), sm=found.sm))


def _report(found: FoundModule, options: AuditOptions) -> AuditReport:
    module, build = found.module, found.build
    if found.problem and module.kind == "file":  # it is not there, or holds nothing
        nothing = MachineCode(problem=found.problem, read=False)
        return decide(module, AuditEvidence(nothing, launch.PdlUse(), sm=found.sm))
    path = Path(module.path) if module.path and not found.problem else None
    limits = ReadLimits(options.seconds, None, options.jobs, None, options.progress)
    code = machine_code_of(path, found.sm, limits) if path else None
    launches: list[launch.PdlUse] = []
    waits: tuple[str, ...] = ()
    if path and code and code.read:
        able = [k.kernel for k in code.kernels if k.sm >= FIRST_SM]
        doubted = [k.name for k in able if k.unwaited or k.doubts]
        if able:
            launches.append(launch.of_host_code(path, doubted))
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
        asked = BarrierTrial(None, "none", found.problem)
    seen = AuditEvidence(
        code,
        launch.combined(launches),
        build.flags if build and found.flags_known else None,
        asked,
        waits,
        found.sm,
        found.notes,
    )
    report = decide(module, seen)
    if report.verdict == FLAGGED and build and module.kind in ("jit", "spec"):
        sm = found.sm or max(
            (k.sm for k in (code.kernels if code else ()) if k.sm >= FIRST_SM), default=0
        )
        report = replace(report, remedy=remedy(module, barrier.flag_works(build, sm)))
    return report


def _no_tools() -> bool:
    return codedigest.disassembler() is None or codedigest.disassembler(TOOL) is None


def audit_findings(
    reports: Iterable[AuditReport], backend: str | None = None
) -> list[dict[str, Any]]:
    """What the ledger needs of each report, as plain JSON data.

    backend: whose findings, for modules that do not say by their name which backend loads them.
    ``verdict`` is ``flagged``, ``doubtful``, ``clean`` or ``unknown``: a backend with a flagged
    module is not safe, whatever a run showed; the others prove nothing. ``digest`` is
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
