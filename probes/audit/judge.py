"""From what was seen of a module to a verdict. Pure.

What was disassembled decides; the flags a module is built with decide only where there is nothing
to disassemble; a version never decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import launch, sass
from .disassemble import ArchKernel, Code
from .launch import Launch

FLAGGED, CLEAN, UNKNOWN = "flagged", "clean", "unknown"
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
class Barrier:
    """Whether CUTLASS's ``wait_on_dependent_grids`` does anything under a module's build flags.

    `waits` is None where that could not be found out. `how` is ``barrier`` (it was compiled with
    those flags and disassembled) or ``flags`` (read from the flags and the header's conditions).
    """

    waits: bool | None
    how: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Module:
    """A module as found. `kind`: ``jit``, ``aot`` (prebuilt, loaded before any JIT build),
    ``spec`` (would be built here) or ``file``."""

    name: str
    kind: str
    path: str | None
    backend: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A module's verdict. `authority` is what decided: ``sass`` (its own machine code),
    ``barrier`` or ``flags`` (see `Barrier`; for what is not built), or ``none``."""

    module: Module
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


def decide(
    module: Module,
    code: Code | None,
    launched: Launch,
    flags: Sequence[str] | None = None,
    barrier: Barrier | None = None,
    hand_written: Sequence[str] = (),
    sm: int | None = None,
) -> Report:
    """The verdict of one module.

    code: what was disassembled, None where nothing is built. flags: those of its build file or
    spec, None where unknown. barrier: only for what is not built, or cannot be disassembled for
    want of a tool. hand_written: its own sources that contain a wait.
    """
    if code is not None and not code.read and barrier is None:
        # Nothing is known of it: the sentence that says why is all there is to say.
        why = (code.problem or "it could not be read",)
        return Report(module, UNKNOWN, "none", why, None, launched.pdl, None, (), sm)
    evidence = _about(module, code, flags, sm)
    if code is not None and code.read:
        verdict, lines = _by_code(code, launched, sm)
        authority = "sass"
    else:
        verdict, lines, authority = _by_barrier(launched, barrier, hand_written)
    evidence += list(launched.evidence) or ["launch: nothing says whether PDL is used"]
    evidence += lines
    return Report(
        module=module,
        verdict=verdict,
        authority=authority,
        evidence=tuple(evidence),
        remedy=remedy(module) if verdict == FLAGGED else None,
        pdl=launched.pdl,
        digest=code.digest if code else None,
        kernels=_kernels(code),
        sm=sm,
    )


def _about(
    module: Module, code: Code | None, flags: Sequence[str] | None, sm: int | None
) -> list[str]:
    lines = []
    if module.version:
        lines.append(f"version {module.version} (decides nothing)")
    if flags is not None:
        macros = sorted({flag for flag in flags if flag.startswith(MACRO)})
        lines.append(f"build flags: {' '.join(macros) or 'no ' + MACRO + '*'}")
    if code is None:
        lines.append("not built yet: judged by what its build would give")
    else:
        if code.problem:
            lines.append(code.problem)
        if code.digest:
            lines.append(f"code digest {code.digest}")
        if code.read and sm and not code.kernels:
            there = ", ".join(f"SM{s}" for s in code.sms)
            lines.append(f"no machine code for SM{sm}; there is code for {there}")
    return lines


def _by_code(code: Code, launched: Launch, sm: int | None) -> tuple[str, list[str]]:
    able = [k for k in code.kernels if k.sm >= FIRST_SM]
    tensor = [k for k in able if k.kernel.mma]
    lines = []
    for (where, wait), count in sorted(
        Counter((k.sm, k.kernel.wait) for k in tensor).items(), key=str
    ):
        these = [k.kernel for k in tensor if (k.sm, k.kernel.wait) == (where, wait)]
        mma = sum((Counter(k.mma) for k in these), Counter[str]())
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(mma.items()))
        waits, triggers = sum(k.waits for k in these), sum(k.triggers for k in these)
        lines.append(
            f"SASS SM{where}: {count} kernels with {kinds}: {wait}"
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
    others = [k for k in able if not k.kernel.mma and k.kernel.wait == sass.NO_WAIT]
    if others:
        lines.append(f"SASS: {len(others)} kernels without tensor-core instructions never wait")
    waiting = {_family(k) for k in tensor if k.kernel.wait != sass.NO_WAIT}
    never = [k for k in tensor if k.kernel.wait == sass.NO_WAIT]
    bare = [k for k in never if _family(k) not in waiting]
    if len(bare) < len(never):
        lines.append(
            f"{len(never) - len(bare)} kernels that never wait differ only in a template switch"
            " from ones that do: variants for launches without PDL"
        )
    if launched.pdl == launch.YES and bare:
        if launched.every or not waiting or any(k.kernel.block_scaled for k in bare):
            lines.append("tensor-core kernels that never wait, in a module that launches with PDL")
            return FLAGGED, lines
        lines.append("which of its kernels are launched with PDL is not known")
    if code.problem:
        return UNKNOWN, [*lines, "part of the code could not be read"]
    if bare and launched.pdl == launch.NO:
        return CLEAN, [*lines, "kernels that never wait are safe as they are launched without PDL"]
    if bare:
        return UNKNOWN, [*lines, "kernels that never wait are safe only if launched without PDL"]
    if tensor:
        return CLEAN, [*lines, "every tensor-core kernel waits somewhere"]
    if not code.kernels:
        return UNKNOWN, [*lines, "no kernels to judge"]
    if not able:
        return CLEAN, [*lines, "its code is for GPUs before SM90, which have no PDL"]
    if others and launched.pdl in (launch.YES, launch.POSSIBLE):
        return UNKNOWN, [*lines, "which of its kernels are launched with PDL is not known"]
    return CLEAN, [*lines, "no kernel has tensor-core instructions"]


def _family(k: ArchKernel) -> tuple[int, str]:
    """A kernel's SM and name without the values of boolean template arguments (``Lb1E``)."""
    return k.sm, re.sub(r"Lb[01]E", "LbE", k.kernel.name)


def _by_barrier(
    launched: Launch, barrier: Barrier | None, hand_written: Sequence[str]
) -> tuple[str, list[str], str]:
    if barrier is None or barrier.waits is None:
        why = barrier.evidence if barrier else "there is no machine code to judge by"
        return UNKNOWN, [why], "none"
    lines = [barrier.evidence]
    if barrier.waits:
        return CLEAN, [*lines, "audit again once it is built: machine code decides"], barrier.how
    if hand_written:
        lines.append(f"waits written by hand in {', '.join(hand_written[:3])}: build it to know")
        return UNKNOWN, lines, "none"
    if launched.pdl == launch.YES:
        lines.append("its kernels would never wait, and it launches them with PDL")
        return FLAGGED, lines, barrier.how
    if launched.pdl == launch.NO:
        return CLEAN, [*lines, "its kernels are launched without PDL"], barrier.how
    return UNKNOWN, [*lines, "whether its kernels are launched with PDL is not known"], "none"


def remedy(module: Module, flag_works: bool | None = None) -> str:
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


def _kernels(code: Code | None) -> tuple[Mapping[str, Any], ...]:
    if code is None:
        return ()
    return tuple({"sm": k.sm, **asdict(k.kernel)} for k in code.kernels)
