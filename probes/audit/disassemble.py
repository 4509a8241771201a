"""Kernels of real files: cuobjdump takes cubins out of libraries, nvdisasm prints their code.

Nothing is held whole in memory: cubins go through the temporary folder, nvdisasm's text through
a pipe, and as many of them run at once as cores and free memory allow.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ...machine import codedigest, elf
from ...machine.memory import free_memory
from ...machine.processes import dying_with_parent
from . import containers, flow, memory, parameters, sass

TOOL = "nvdisasm"
SECONDS = 1800.0
"""Longest time for one file: 92 MB of machine code take nvdisasm about 180 s on one core."""

# Resident size of nvdisasm over that of its cubin: 640 MB for 15 MB, measured with 13.0.
_FACTOR, _BASE = 45, 64 << 20

Progress = Callable[[str, int, int], None]
"""Called with what is being read, and how many bytes of machine code of how many are done."""


@dataclass(frozen=True, slots=True)
class ArchKernel:
    """A kernel and the SM its code is for."""

    sm: int
    kernel: sass.SassKernel


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What a file holds for the SM asked for. `problem` says why something could not be read."""

    kernels: tuple[ArchKernel, ...] = ()
    sms: tuple[int, ...] = ()
    """Every SM there is code for."""
    digest: str | None = None
    """As in `codedigest.of`, over the code for all SMs; None where any could not be read."""
    problem: str | None = None
    read: bool = True
    """False where `problem` concerns the whole file, and nothing is known of its kernels."""
    tool_seconds: float = 0.0
    """Time cuobjdump and nvdisasm took, summed over those that ran at once."""


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """seconds: for the whole file. memory: bytes that disassemblers may take together; default
    half of what is free. jobs: disassemblers at once; default one a core. only: the one kernel
    wanted, and what it may call; a library's module of thousands of kernels would take seconds."""

    seconds: float = SECONDS
    memory: int | None = None
    jobs: int | None = None
    only: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class _Cubin:
    path: str
    sm: int
    exact: bool
    """Whether its code runs on that SM alone, as that of ``sm_90a`` does."""
    size: int
    kernels: tuple[tuple[str, str], ...]
    """Name and hash of each."""
    symbols: tuple[int, ...]
    """Of the functions to print; empty for all."""
    parameters: Mapping[str, parameters.Parameters]

    def runs_on(self, sm: int) -> bool:
        return self.sm == sm if self.exact else runs_on(self.sm, sm)


def machine_code_of(
    path: str | os.PathLike[str], sm: int | None = None, limits: ReadLimits = ReadLimits()
) -> MachineCode:
    """Disassemble the kernels in a cubin, object, library, archive or fatbin; those an `sm` GPU
    could run.

    Never raises for what the file holds: `MachineCode.problem` has one sentence instead. A cubin
    that was read before, here or by another process, is not disassembled again.
    """
    name = os.path.basename(path)
    seconds = limits.seconds
    try:
        with containers.cubins(os.fspath(path), seconds) as (files, took):
            return _Reading(name, limits, took).code(files, sm)
    except subprocess.TimeoutExpired:
        return MachineCode(problem=f"{name}: cuobjdump took longer than {seconds:g} s", read=False)
    except OSError as error:
        return MachineCode(problem=f"{name}: {error.strerror or error}", read=False)
    except (elf.BadElf, codedigest.NoCode) as error:
        return MachineCode(problem=f"{name}: {error}", read=False)


class _Reading:
    """The cubins of one file on their way to kernels."""

    def __init__(self, name: str, limits: ReadLimits, took: float) -> None:
        self.name = name
        self.limits = limits
        self.took = took
        self.deadline = time.monotonic() + limits.seconds
        self.memory = limits.memory or free_memory() // 2
        self.jobs = limits.jobs or cores()
        self.done = self.total = 0
        self.lock = threading.Lock()

    def code(self, files: Sequence[str], sm: int | None) -> MachineCode:
        cubins = [_cubin(file, self.limits.only) for file in files]
        words = [word for cubin in cubins for _, word in cubin.kernels]
        # The same code is often in several cubins; once is enough, unless its names differ: how
        # a kernel is launched depends on its name.
        unique = {
            (c.sm, c.kernels): c for c in cubins if c.kernels and (sm is None or c.runs_on(sm))
        }
        found: list[ArchKernel] = []
        problems: list[str] = []
        for cubin, kernels, problem in self._read(sorted(unique.values(), key=lambda c: -c.size)):
            found += [ArchKernel(cubin.sm, kernel) for kernel in kernels]
            if problem:
                problems.append(problem)
        return MachineCode(
            kernels=tuple(found),
            sms=tuple(sorted({c.sm for c in cubins})),
            digest=codedigest.total(words) if words else None,
            problem=f"{self.name}: {problems[0]}" if problems else None,
            tool_seconds=self.took,
        )

    def _read(
        self, wanted: Sequence[_Cubin]
    ) -> Iterator[tuple[_Cubin, Sequence[sass.SassKernel], str | None]]:
        """The kernels of each, several at once."""
        self.total = sum(cubin.size for cubin in wanted)
        with ThreadPoolExecutor(self.jobs) as pool:
            for cubin, result in zip(wanted, pool.map(self._one, wanted), strict=True):
                yield cubin, *result

    def _one(self, cubin: _Cubin) -> tuple[Sequence[sass.SassKernel], str | None]:
        with open(cubin.path, "rb") as file:
            key = memory.key(file.read(), cubin.symbols)
        known = memory.recall(key)
        if known is not None:
            self._progress(cubin)
            return known, None
        tool = codedigest.disassembler(TOOL)
        if tool is None:
            raise codedigest.NoCode(
                f"no disassembler: {TOOL} is not on PATH, in CUDA_HOME or in a wheel"
                " (pip install nvidia-cuda-nvdisasm)"
            )
        sections = len(cubin.symbols or cubin.kernels)
        with _ROOM.taken(_BASE + _FACTOR * cubin.size, self.memory, self.jobs):
            kernels, problem, spent = disassembled(tool, cubin, sections, self.deadline)
        with self.lock:
            self.took += spent
        if problem is None:
            memory.remember(key, kernels)
        self._progress(cubin)
        return kernels, problem

    def _progress(self, cubin: _Cubin) -> None:
        with self.lock:
            self.done += cubin.size
            if self.limits.progress:
                self.limits.progress(self.name, self.done, self.total)


def cores() -> int:
    """How many this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


def holds_code(path: str | os.PathLike[str]) -> bool:
    """Whether a file may hold GPU code: False only for a whole host library without any."""
    return containers.may_hold_code(os.fspath(path))


def _cubin(path: str, only: str | None) -> _Cubin:
    with codedigest.mapped(path) as data:
        parsed = elf.parse(data)
        if not parsed.sections:
            raise elf.BadElf(containers.NO_HEADERS)
        words = tuple(sorted(codedigest.words_by_kernel(data, parsed).items()))
        symbols = () if only is None else around(only, elf.functions(data, parsed))
        known = parameters.of_kernels(data, parsed)
        exact = bool(re.search(r"\.sm_\d+a\.cubin$", path))
        return _Cubin(path, sm_of(data, parsed), exact, len(data), words, symbols, known)


def around(kernel: str, functions: Iterable[elf.ElfFunction]) -> tuple[int, ...]:
    """Symbols of the sections that hold `kernel` and what kernels share: one of each section.

    Empty where it has no symbol. A section is a kernel's own, with functions only that kernel
    calls, or one that no kernel is in.
    """
    first: dict[elf.ElfSection, int] = {}
    own: set[elf.ElfSection] = set()
    kernels: set[elf.ElfSection] = set()
    for function in functions:
        first.setdefault(function.section, function.index)
        if function.other & elf.CUDA_ENTRY:
            kernels.add(function.section)
        if function.name == kernel:
            own.add(function.section)
    wanted = (set(first) - kernels) | own
    return tuple(first[section] for section in first if section in wanted) if own else ()


def sm_of(data: bytes | memoryview, parsed: elf.Elf) -> int:
    """The SM a cubin is for, from its ELF flags: bits 8 to 15 from ABI 8 on (CUDA 13), before
    that bits 0 to 7. Compared with nvdisasm's ``.target`` for 90, 100, 103, 110, 120 and 121."""
    return (parsed.flags >> 8 if data[8] >= 8 else parsed.flags) & 0xFF


def runs_on(code: int, sm: int) -> bool:
    """Whether machine code for SM `code` runs on SM `sm`: same generation, not newer."""
    return code // 10 == sm // 10 and code <= sm


def disassembled(
    tool: str, cubin: _Cubin, sections: int, deadline: float
) -> tuple[list[sass.SassKernel], str | None, float]:
    """(the kernels, why some are missing, seconds waited for nvdisasm).

    sections: how many sections of machine code are to come out.
    """
    symbols, known = cubin.symbols, cubin.parameters
    waited = 0.0
    count = 0

    def read(size: int) -> bytes:
        nonlocal waited
        start = time.monotonic()
        block = process.stdout.read(size) if process.stdout else b""
        waited += time.monotonic() - start
        return block

    def counted() -> Iterator[bytes]:
        nonlocal count
        for piece in sass.pieces(read):
            count += piece.count(b"\t.section\t.text.")
            yield piece

    process = subprocess.Popen(
        [tool, "-c", *(("-fun", ",".join(map(str, symbols))) if symbols else ()), cubin.path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=dying_with_parent(),
    )
    late = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
    late.start()
    said: list[bytes] = []
    # Its complaints are read beside its code, else a full pipe would stop it.
    errors = threading.Thread(target=lambda: said.append(process.stderr.read(1 << 16)))  # type: ignore[union-attr]
    errors.start()
    try:
        kernels = list(flow.kernels(counted(), known))
        process.wait()
    finally:
        late.cancel()
        process.kill()
        process.wait()
        errors.join()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
    if process.returncode != 0:
        if time.monotonic() >= deadline:
            return kernels, f"{TOOL} was stopped: the time for this file was over", waited
        lines = b"".join(said).decode(errors="replace").strip().splitlines()
        worst = [line for line in lines if "warning" not in line] or lines
        return kernels, f"{TOOL} failed: {worst[0] if worst else process.returncode}", waited
    if count < sections:
        return kernels, f"{TOOL} printed {count} of {sections} pieces of machine code", waited
    return kernels, None, waited


class _Room:
    """Memory and places for disassemblers, over all files that are read at once; one that needs
    more than all of it runs alone."""

    def __init__(self) -> None:
        self._used = self._running = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int, most: int, jobs: int) -> Iterator[None]:
        """Wait until `size` bytes are free of `most`, and fewer than `jobs` disassemblers run."""
        size = min(size, most)
        with self._changed:
            self._changed.wait_for(lambda: self._used + size <= most and self._running < jobs)
            self._used += size
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._running -= 1
                self._changed.notify_all()


_ROOM = _Room()
