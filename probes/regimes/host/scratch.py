"""Canaries around every block of device memory that a backend takes: overruns inside a pool."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...backends import Backend
from ...check.sweep import SlotReport
from ...data import exact
from ...launch.case import Case, Launch, bind, blame
from ...launch.case import case as make_case
from ...launch.outcome import Budget, NotApplicable, Outcome, device_of, need_cuda
from ...registry import load_one
from .own_process import NoAnswer, Question, ask, loaded_by, name_of

SOURCE = Path(__file__).with_name("canaries.c")
ZONE = 512
"""Bytes before and behind each block, as in the C source."""
_ROWS = 512
"""Rows of the pool that is drawn, and the largest m that is called under canaries."""
_ROUNDS = 2


def scratch(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every launch in a process whose memory comes from an allocator with canaries.

    Torch's own allocator gives out parts of large pieces, so that what is written past the end of a
    workspace lands in another one and is seen by luck. Here each block ends where it was said to.
    Memory that a library takes from the driver by itself is not seen.
    """
    need_cuda(cases, "memory of a device")
    spec = loaded_by(backend)
    if spec is None:
        raise NotApplicable("a backend that was made in this process cannot be loaded in another")
    if compiler() is None:
        raise NotApplicable("there is no C compiler to make the allocator with")
    start = time.perf_counter()
    errors: dict[int, dict[str, str]] = {}
    mine = [launch for launch in launches if 0 < launch.m <= _ROWS]
    exempt = {x.item: f"no m of it is from 1 to {_ROWS}" for x in launches}
    proof: dict[str, Any] = {"blocks": 0}
    for width in sorted({cases[x.case].operands.width or 8 for x in mine}):
        case = cases[mine[0].case]
        question = Question(
            "scratch",
            spec,
            replace(case.problem, m=_ROWS),
            width,
            case.operands.seed,
            tuple(x.m for x in mine),
            tuple(x.tactic for x in mine),
            name_of(device_of(cases)),
        )
        try:
            found = ask(question, budget.beat)
        except NoAnswer as error:
            found = {"error": {"kind": error.kind, "message": str(error)}}
        proof["blocks"] += found.get("blocks", 0)
        for launch in mine:
            exempt.pop(launch.item, None)
            told = found.get("error") or found["by_tactic"].get(launch.tactic)
            if told:
                errors[launch.item] = told
    clean = SlotReport(0, 0, 0, 0, 0, None, ())
    missed = None if proof["blocks"] or errors else "no memory came from the allocator"
    return Outcome(
        repeats=_ROUNDS,
        reports=tuple((launch, clean) for launch in mine),
        changed_inputs=0,
        seconds=time.perf_counter() - start,
        not_exercised=missed if mine else None,
        proof=proof,
        errors=errors,
        exempt=exempt,
    )


def compiler() -> str | None:
    """A C compiler, where there is one."""
    return shutil.which("gcc") or shutil.which("cc")


def build(folder: Path) -> Path:
    """The allocator as a shared object in `folder`. Raises RuntimeError."""
    made = folder / "canaries.so"
    found = compiler()
    if found is None:
        raise RuntimeError("there is no C compiler")
    flags = ["-O1", "-shared", "-fPIC", "-std=gnu11"]
    done = subprocess.run(
        [found, *flags, str(SOURCE), "-o", str(made), "-ldl", "-lpthread"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the allocator does not compile: {done.stderr.strip()[:200]}")
    return made


@dataclass(frozen=True, slots=True)
class Damage:
    """What canaries say: blocks given out so far, zones that changed, the bytes of them, how near
    to its block the nearest was, and the size of the smallest such block."""

    blocks: int
    zones: int
    changed: int
    nearest: int
    smallest: int


def read(library: ctypes.CDLL) -> Damage:
    """Look at the zones of every block; waits for the device."""
    found = (ctypes.c_longlong * 5)()
    library.canaries_check(found)
    return Damage(*found)


def answer(question: Question) -> dict[str, Any]:
    """In the child: every launch with canaries in place, looked at after each tactic."""
    with tempfile.TemporaryDirectory(prefix="fp4tune-canaries-") as folder:
        path = build(Path(folder))
        # Before anything is allocated: an allocator in use cannot be changed.
        allocator = torch.cuda.memory.CUDAPluggableAllocator(
            str(path), "canaries_malloc", "canaries_free"
        )
        torch.cuda.memory.change_current_allocator(allocator)
        library = ctypes.CDLL(str(path))
        backend = load_one(question.spec)
        device = torch.device(question.device)
        operands = exact(question.problem, question.width, question.seed, device)
        case = make_case(backend, question.problem, operands)
        if read(library).zones:
            where = _error(read(library), "`prepare`")
            return {"error": where, "blocks": read(library).blocks}
        by_tactic: dict[str, dict[str, str]] = {}
        before = 0
        for tactic in dict.fromkeys(question.tactics):
            pairs = zip(question.ms, question.tactics, strict=True)
            launches = [Launch(0, 0, m, t, 0) for m, t in pairs if t == tactic]
            for _ in range(_ROUNDS):
                for launch in launches:
                    call = bind(backend, [case], launch)
                    with blame(backend):
                        call.enqueue()
                    del call
            damage = read(library)
            if damage.zones > before:
                by_tactic[tactic] = _error(damage, f"calls of {tactic}")
            before = damage.zones
        return {"by_tactic": by_tactic, "blocks": read(library).blocks}


def _error(damage: Damage, who: str) -> dict[str, str]:
    text = (
        f"{who} wrote outside of memory that was given out: {damage.changed} bytes in "
        f"{damage.zones} zones, the nearest {damage.nearest} bytes from its block; the smallest "
        f"such block has {damage.smallest} bytes"
    )
    return {"kind": "out of bounds", "message": text}
