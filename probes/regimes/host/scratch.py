"""Canaries around every block of device memory that a backend takes: overruns inside a pool."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...backends import Backend
from ...check.reference import Expectation
from ...check.sweep import SlotReport, Unchanged
from ...data import Operands
from ...grouped.backend import AsDense
from ...grouped.problem import ExpertsProblem
from ...launch.case import Case, Launch, bind, blame
from ...launch.outcome import Budget, NotApplicable, Outcome, need_cuda
from ...launch.routed_cases import uniform_case
from ...problem import FORMATS, Device, Fp4Tensor, Problem
from .own_process import (
    NoAnswer,
    Question,
    ask,
    backend_there,
    loaded_by,
    name_of,
    start_early,
    whole_problem,
)

SOURCE = Path(__file__).with_name("canaries.c")
_ROWS = 512
"""Rows of the pool that is drawn, and the largest m that is called under canaries."""
_ROUNDS = 2
_CALLS_SECONDS = 2.0
"""Seconds after which only the smallest and the largest m of each tactic are called, in a child."""
_Told = dict[str, dict[str, str] | None]
"""By tactic: what was wrong with its calls, if anything."""
_asked: dict[tuple[int, Problem], tuple[Backend, _Told]] = {}
"""By the backend's id and the layer: what processes of their own have said. Starting one takes
seconds, so a tactic is asked about once, in however many chains its launches come."""


def scratch(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every tactic in a process whose memory comes from an allocator with canaries.

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
    mine = [launch for launch in launches if 0 < launch.m <= _ROWS]
    _, told = _asked.setdefault((id(backend), replace(cases[0].problem, m=0)), (backend, {}))
    fresh = [launch for launch in mine if launch.tactic not in told]
    proof: dict[str, Any] = {"blocks": 0, "own_processes": int(bool(fresh))}
    missed = None
    if fresh:
        found = _ask_of(backend, spec, cases[fresh[0].case], fresh, budget)
        if found.get("error", {}).get("kind") == "out of memory":  # others may hold less by now
            before = found.get("by_tactic", {})
            found = _ask_of(backend, spec, cases[fresh[0].case], fresh, budget)
            found["by_tactic"] = before | found.get("by_tactic", {})
        proof["blocks"] = found.get("blocks", 0)
        if proof["blocks"] or "error" in found:
            for launch in fresh:
                by_tactic = found.get("by_tactic", {})
                told[launch.tactic] = by_tactic.get(launch.tactic) or found.get("error")
        else:
            missed = "no memory came from the allocator"
    errors = {x.item: error for x in mine if (error := told.get(x.tactic))}
    clean = SlotReport(0, 0, 0, 0, 0, None, ())
    called = {launch.item for launch in mine}
    return Outcome(
        repeats=_ROUNDS,
        reports=tuple((launch, clean) for launch in mine),
        changed_inputs=0,
        seconds=time.perf_counter() - start,
        not_exercised=missed,
        proof=proof,
        errors=errors,
        exempt={
            x.item: f"no m of it is from 1 to {_ROWS}" for x in launches if x.item not in called
        },
    )


def start_scratch(backend: Backend, device: Device) -> None:
    """Start the process that will be asked: to load the backend takes longer than its calls."""
    spec = loaded_by(backend)
    if device.kind == "cuda" and spec is not None and compiler() is not None:
        start_early(spec)


def _ask_of(
    backend: Backend, spec: str, case: Case, launches: Sequence[Launch], budget: Budget
) -> dict[str, Any]:
    """What a process of its own says of these launches."""
    pairs = list(dict.fromkeys((launch.m, launch.tactic) for launch in launches))
    question = Question(
        "scratch",
        spec,
        whole_problem(backend, case, _ROWS),
        case.operands.width or 8,
        case.operands.seed,
        tuple(m for m, _ in pairs),
        tuple(tactic for _, tactic in pairs),
        name_of(case.operands.weight.codes.device),
        case.expectation.exact,
    )
    try:
        return ask(question, budget.beat)
    except NoAnswer as error:
        return {"error": {"kind": error.kind, "message": str(error)}}


def in_order(ms: Sequence[int], tactics: Sequence[str]) -> list[tuple[str, list[int]]]:
    """What is called, by turns within each: every tactic's smallest and largest m first, and then,
    for those that have more, the rest. `ms` and `tactics` go together."""
    of: dict[str, list[int]] = {}
    for m, tactic in sorted(set(zip(ms, tactics, strict=True))):
        of.setdefault(tactic, []).append(m)
    edges = [(tactic, list(dict.fromkeys((mine[0], mine[-1])))) for tactic, mine in of.items()]
    return edges + [(tactic, mine[1:-1]) for tactic, mine in of.items() if len(mine) > 2]


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
    to its block the nearest was, the size of the smallest such block, and how often the device had
    no memory to give."""

    blocks: int
    zones: int
    changed: int
    nearest: int
    smallest: int
    refused: int


def read(library: ctypes.CDLL) -> Damage:
    """Look at the zones of every block; waits for the device."""
    found = (ctypes.c_longlong * 6)()
    library.canaries_check(found)
    return Damage(*found)


def answer(question: Question, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """In the child: every launch with canaries in place, looked at after each tactic; `alive` is
    called whenever it got on."""
    with tempfile.TemporaryDirectory(prefix="fp4tune-canaries-") as folder:
        try:
            path = build(Path(folder))
            # Before anything is allocated: an allocator in use cannot be changed.
            allocator = torch.cuda.memory.CUDAPluggableAllocator(
                str(path), "canaries_malloc", "canaries_free"
            )
            torch.cuda.memory.change_current_allocator(allocator)
        except RuntimeError as error:
            raise OSError(f"there are no canaries: {error}") from error  # no fault of the backend
        library = ctypes.CDLL(str(path))
        by_tactic: dict[str, dict[str, str]] = {}
        try:
            _under_canaries(library, question, by_tactic, alive)
        except Exception as error:
            # Torch takes what such an allocator gives, nothing too, and a kernel then fails at it.
            if not isinstance(error, MemoryError) and not read(library).refused:
                raise
            short = {"kind": "out of memory", "message": "the device had no memory left"}
            return {"by_tactic": by_tactic, "error": short, "blocks": read(library).blocks}
        return {"by_tactic": by_tactic, "blocks": read(library).blocks}


def _under_canaries(
    library: ctypes.CDLL,
    question: Question,
    by_tactic: dict[str, dict[str, str]],
    alive: Callable[[], None],
) -> None:
    """Every launch of the question, and the zones looked at after each tactic; what was wrong comes
    into `by_tactic`. Raises MemoryError where an allocation was refused."""
    backend = backend_there(question)
    alive()
    device = torch.device(question.device)
    problem = question.problem
    if isinstance(problem, ExpertsProblem):
        assert isinstance(backend, AsDense)
        case = uniform_case(backend, problem, device)
    else:
        case = _any_case(backend, problem, device)
    alive()
    if (damage := read(library)).zones:
        by_tactic |= dict.fromkeys(question.tactics, _error(damage, "`prepare`"))
        return
    before = 0
    end = time.monotonic() + _CALLS_SECONDS
    seen: set[str] = set()
    for tactic, ms in in_order(question.ms, question.tactics):
        if tactic in seen and time.monotonic() > end:
            break
        seen.add(tactic)
        for m in ms * _ROUNDS:
            call = bind(backend, [case], Launch(0, 0, m, tactic, 0))
            with blame(backend):
                call.enqueue()
            del call
            alive()
        damage = read(library)
        if damage.zones > before:
            by_tactic.setdefault(tactic, _error(damage, f"calls of {tactic}"))
        before = damage.zones
        if damage.refused:
            raise MemoryError


def _any_case(backend: Backend, problem: Problem, device: torch.device) -> Case:
    """A weight and rows of no matter which values, made of few allocations: each costs a call of
    the driver here, and what comes out is not compared."""
    fmt = FORMATS[problem.format]
    one = 0x38 if fmt.scale == "e4m3" else 127

    def operand(rows: int) -> Fp4Tensor:
        codes = torch.full((rows, problem.k // 2), 0x21, dtype=torch.uint8, device=device)
        scales = torch.full((rows, problem.k // fmt.block), one, dtype=torch.uint8, device=device)
        return Fp4Tensor(fmt, codes, scales, torch.ones((), device=device))

    weight = operand(problem.n)
    if problem.activation == "fp4":
        a: torch.Tensor | Fp4Tensor = operand(problem.m)
    else:
        a = torch.ones(problem.m, problem.k, dtype=problem.dtype, device=device)
    with blame(backend):
        state = backend.prepare(weight, problem)
    nothing = torch.zeros(problem.m, problem.n, dtype=problem.dtype, device=device)
    operands = Operands(a, weight, "none", None, 0)
    return Case(problem, operands, Expectation(nothing, nothing, exact=False), state, Unchanged([]))


def _error(damage: Damage, who: str) -> dict[str, str]:
    text = (
        f"{who} wrote outside of memory that was given out: {damage.changed} bytes in "
        f"{damage.zones} zones, the nearest {damage.nearest} bytes from its block; the smallest "
        f"such block has {damage.smallest} bytes"
    )
    return {"kind": "out of bounds", "message": text}
