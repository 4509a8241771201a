"""From what was seen of a module to a verdict. Pure.

What was disassembled decides; the flags a module is built with decide only where there is nothing
to disassemble; a version never decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import launch, sass
from .disassemble import ArchKernel, MachineCode
from .launch import PdlUse
from .names import short, shortened

FLAGGED, DOUBTFUL, CLEAN, UNKNOWN = "flagged", "doubtful", "clean", "unknown"
_WORST = (FLAGGED, DOUBTFUL, UNKNOWN, CLEAN)
MACRO = "-DCUTLASS_ENABLE_GDC_FOR_SM"
FLAG = MACRO + "100=1"
FIRST_SM = 90
"""Programmatic dependent launch needs SM90."""

ABOUT_WAITS = "a wait that is present is no proof of safety: it may come too late or on some paths"
ABOUT_ACCESS = (
    "an access before the wait is not by itself unsafe: weights may be prefetched, and other warps"
    " may wait for this one; a probe decides"
)


@dataclass(frozen=True, slots=True)
class BarrierTrial:
    """Whether CUTLASS's ``wait_on_dependent_grids`` does anything under a module's build flags.

    `waits` is None where that could not be found out. `how` is ``barrier`` (it was compiled with
    those flags and disassembled) or ``flags`` (read from the flags and the header's conditions).
    """

    waits: bool | None
    how: str
    evidence: str


@dataclass(frozen=True, slots=True)
class GpuModule:
    """A module as found. `kind`: ``jit``, ``aot`` (prebuilt, loaded before any JIT build),
    ``spec`` (would be built here) or ``file``."""

    name: str
    kind: str
    path: str | None
    backend: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class AuditReport:
    """A module's verdict. `authority` is what decided: ``sass`` (its own machine code),
    ``barrier`` or ``flags`` (see `BarrierTrial`; for what is not built), or ``none``."""

    module: GpuModule
    verdict: str
    authority: str
    evidence: tuple[str, ...]
    remedy: str | None
    pdl: str
    digest: str | None
    kernels: tuple[Mapping[str, Any], ...]
    sm: int | None = None
    """The SM that was asked about; None: all there is code for."""

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class AuditEvidence:
    """What was seen of one module.

    code: what was disassembled, None where nothing is built. flags: those of its build file or
    spec, None where unknown. barrier: only for what is not built, or cannot be disassembled for
    want of a tool. hand_written: its own sources that contain a wait. sm: that was asked about.
    notes: further lines, which decide nothing.
    """

    code: MachineCode | None
    launched: PdlUse
    flags: Sequence[str] | None = None
    barrier: BarrierTrial | None = None
    hand_written: Sequence[str] = ()
    sm: int | None = None
    notes: Sequence[str] = ()


def decide(module: GpuModule, seen: AuditEvidence) -> AuditReport:
    """The verdict of one module."""
    code, launched = seen.code, seen.launched
    if code is not None and not code.read and seen.barrier is None:
        # Nothing is known of it: the sentence that says why is all there is to say.
        why = (*seen.notes, code.problem or "it could not be read")
        return AuditReport(module, UNKNOWN, "none", why, None, launched.pdl, None, (), seen.sm)
    evidence = [*_about(module, seen), *seen.notes]
    kernels: tuple[Mapping[str, Any], ...] = ()
    if code is not None and code.read:
        verdict, lines = _by_code(code, launched, seen.sm)
        authority = "sass"
        kernels = tuple(_kernel_row(k, launched) for k in code.kernels)
    else:
        verdict, lines, authority = _by_barrier(seen)
    evidence += list(launched.evidence) or ["launch: nothing says whether PDL is used"]
    evidence += lines
    return AuditReport(
        module=module,
        verdict=verdict,
        authority=authority,
        evidence=tuple(evidence),
        remedy=remedy(module) if verdict == FLAGGED else None,
        pdl=launched.pdl,
        digest=code.digest if code else None,
        kernels=kernels,
        sm=seen.sm,
    )


def _about(module: GpuModule, seen: AuditEvidence) -> list[str]:
    lines = []
    code = seen.code
    if module.version:
        lines.append(f"version {module.version} (decides nothing)")
    if seen.flags is not None:
        macros = sorted({flag for flag in seen.flags if flag.startswith(MACRO)})
        lines.append(f"build flags: {' '.join(macros) or 'no ' + MACRO + '*'}")
    if code is None:
        lines.append("not built yet: judged by what its build would give")
    else:
        if code.problem:
            lines.append(code.problem)
        if code.digest:
            lines.append(f"code digest {code.digest}")
        if code.read and seen.sm and not code.kernels:
            there = ", ".join(f"SM{s}" for s in code.sms)
            lines.append(f"no machine code for SM{seen.sm}; there is code for {there}")
    return lines


def judge_kernel(found: ArchKernel, launch_of_it: str) -> tuple[str, str | None]:
    """The verdict of one kernel and why, None where no fault was seen.

    Nothing is excused by its name: a kernel without a wait is cleared by its own launch alone,
    and one that multiplies block-scaled operands is flagged until that launch is known.
    """
    kernel = found.kernel
    if found.sm < FIRST_SM or launch_of_it == launch.NO:
        return CLEAN, None
    if kernel.unwaited:
        what = "waits only after its last access" if kernel.idle else "never waits"
        if launch_of_it == launch.YES:
            return FLAGGED, f"{what}, and is launched with PDL"
        if kernel.block_scaled:
            return FLAGGED, f"{what}, and nothing shows that it is launched without PDL"
        return UNKNOWN, f"{what}: safe only if it is launched without PDL, which is not known"
    if kernel.doubts:
        return DOUBTFUL, "; ".join(kernel.doubts)
    return CLEAN, None


def worst(verdicts: Iterable[str]) -> str:
    """The verdict of a whole by those of its parts."""
    return min(verdicts, key=_WORST.index, default=CLEAN)


def _by_code(code: MachineCode, launched: PdlUse, sm: int | None) -> tuple[str, list[str]]:
    able = [k for k in code.kernels if k.sm >= FIRST_SM]
    tensor = [k for k in able if k.kernel.mma]
    lines = _waits(tensor)
    judged = [(k, *judge_kernel(k, launched.of(k.kernel.name))) for k in able]
    grouped: dict[tuple[str, str], list[ArchKernel]] = {}
    for k, verdict, why in judged:
        if why is not None:
            grouped.setdefault((verdict, why.partition(": 0x")[0]), []).append(k)
    for (verdict, why), these in sorted(grouped.items(), key=lambda g: _WORST.index(g[0][0])):
        some = ", ".join(dict.fromkeys(short(k.kernel.name) for k in these[:40]))
        kind = "tensor-core kernel" if all(k.kernel.mma for k in these) else "kernel"
        plural = "s" if len(these) > 1 else ""
        lines.append(f"{verdict}: {len(these)} {kind}{plural}: {why} ({shortened(some)})")
    never = [k for k, verdict, _ in judged if k.kernel.unwaited and verdict == CLEAN]
    if never:
        lines.append(f"{len(never)} kernels never wait, and are launched without PDL")
    verdict = worst(v for _, v, _ in judged)
    if verdict == FLAGGED:
        return verdict, [*lines, "kernels that never wait, in a module that may start them early"]
    if code.problem:
        return UNKNOWN, [*lines, "part of the code could not be read"]
    if not code.kernels:
        return UNKNOWN, [*lines, "no kernels to judge"]
    if not able:
        return CLEAN, [*lines, "its code is for GPUs before SM90, which have no PDL"]
    if verdict != CLEAN:
        return verdict, lines
    waiting = "every kernel that touches memory waits somewhere, or is launched without PDL"
    return CLEAN, [*lines, f"no fault seen: {waiting}"]


def _waits(tensor: Sequence[ArchKernel]) -> list[str]:
    """What the tensor-core kernels multiply with and how they wait, a line a kind."""
    lines = []
    kinds = Counter((k.sm, k.kernel.wait) for k in tensor)
    for (where, wait), count in sorted(kinds.items(), key=str):
        these = [k.kernel for k in tensor if (k.sm, k.kernel.wait) == (where, wait)]
        mma = sum((Counter(k.mma) for k in these), Counter[str]())
        with_what = ", ".join(f"{n} {kind}" for kind, n in sorted(mma.items()))
        waits, triggers = sum(k.waits for k in these), sum(k.triggers for k in these)
        lines.append(
            f"SASS SM{where}: {count} kernels with {with_what}: {wait}"
            f" (ACQBULK {waits}, PREEXIT {triggers})"
        )
        if first := next((k.first_access for k in these if k.first_access), None):
            lines.append(f"SASS SM{where}: first global access without a wait: {first}")
    if any(k.kernel.wait == sass.WAIT_PRESENT for k in tensor):
        lines.append(ABOUT_WAITS)
    if any(k.kernel.wait == sass.ACCESS_BEFORE_WAIT for k in tensor):
        lines.append(ABOUT_ACCESS)
    if any(k.kernel.unfollowed for k in tensor):
        lines.append("some indirect branches or calls could not be followed")
    return lines


def _by_barrier(seen: AuditEvidence) -> tuple[str, list[str], str]:
    barrier, launched = seen.barrier, seen.launched
    if barrier is None or barrier.waits is None:
        why = barrier.evidence if barrier else "there is no machine code to judge by"
        return UNKNOWN, [why], "none"
    lines = [barrier.evidence]
    if barrier.waits:
        return CLEAN, [*lines, "audit again once it is built: machine code decides"], barrier.how
    if seen.hand_written:
        files = ", ".join(seen.hand_written[:3])
        return UNKNOWN, [*lines, f"waits written by hand in {files}: build it to know"], "none"
    if launched.pdl == launch.YES:
        lines.append("its kernels would never wait, and it launches them with PDL")
        return FLAGGED, lines, barrier.how
    if launched.pdl == launch.NO:
        return CLEAN, [*lines, "its kernels are launched without PDL"], barrier.how
    if launched.pdl == launch.POSSIBLE and launched.block_scaled:
        lines.append("its block-scaled kernels would never wait, and PDL is decided as it runs")
        return DOUBTFUL, lines, barrier.how
    return UNKNOWN, [*lines, "whether its kernels are launched with PDL is not known"], "none"


def remedy(module: GpuModule, flag_works: bool | None = None) -> str:
    """What to do about a flagged module, for that kind of install.

    flag_works: whether the missing flag makes this install's CUTLASS wait on that SM; None where
    that was not tried.
    """
    again = "then audit again, since only the new machine code shows that it worked"
    upgrade = "upgrade flashinfer-python and audit what that builds"
    build = f"build with FLASHINFER_EXTRA_CUDAFLAGS={FLAG}"
    if flag_works:
        build += " (tried: its launch barrier waits then)"
    if module.kind in ("jit", "spec"):
        first = f"delete {module.path}, then " if module.kind == "jit" else ""
        if flag_works is False:
            return f"{first}{upgrade}; {FLAG} does not help here, its CUTLASS ignores it"
        return f"{first}{build}, or {upgrade}; {again}"
    if module.kind == "aot":
        return (
            "it is prebuilt and loaded before any JIT build, so flags and a cleared cache change"
            " nothing: upgrade flashinfer-python together with its flashinfer-jit-cache wheel, or"
            " remove it (uninstall that wheel; under flashinfer/data/aot delete its folder) and"
            f" {build}; {again}"
        )
    return (
        "rebuild it so that its kernels execute griddepcontrol.wait before they touch what the"
        " kernel before them reads or writes (CUTLASS: -DCUTLASS_ENABLE_GDC_FOR_SM90=1, from SM100"
        f" on {FLAG}), or launch it without PDL; {again}"
    )


def _kernel_row(found: ArchKernel, launched: PdlUse) -> Mapping[str, Any]:
    of_it = launched.of(found.kernel.name)
    verdict, why = judge_kernel(found, of_it)
    judged = {"launched_with_pdl": of_it, "verdict": verdict, "why": why}
    return {"sm": found.sm, **asdict(found.kernel), **judged}
