"""Kernels of real files: cuobjdump takes cubins out of libraries, nvdisasm prints their code.

Nothing is held whole in memory: cubins go through the temporary folder, nvdisasm's text through
a pipe, and as many of them run at once as cores and free memory allow.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ...machine import codedigest, elf
from ...machine.memory import free_memory
from ...machine.processes import dying_with_parent
from . import sass

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
    kernel: sass.Kernel


@dataclass(frozen=True, slots=True)
class Code:
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
class _Cubin:
    path: str
    sm: int
    size: int
    words: tuple[str, ...]
    symbols: tuple[int, ...]
    """Of the functions to print; empty for all."""


def examine(
    path: str | os.PathLike[str],
    sm: int | None = None,
    progress: Progress | None = None,
    seconds: float = SECONDS,
    memory: int | None = None,
    only: str | None = None,
) -> Code:
    """Disassemble the kernels in a ``.cubin``, ``.o`` or ``.so``; those an `sm` GPU could run.

    Never raises for what the file holds: `Code.problem` has one sentence instead.
    seconds: for the whole file. memory: bytes that disassemblers may take together; default half
    of what is free. only: the one kernel wanted, and what it may call; a library's module of
    thousands of kernels would take seconds.
    """
    name = os.path.basename(path)
    deadline = time.monotonic() + seconds
    try:
        with _cubins(os.fspath(path), seconds) as (files, took):
            room = memory or free_memory() // 2
            return _code(files, sm, progress, deadline, room, name, took, only)
    except subprocess.TimeoutExpired:
        return Code(problem=f"{name}: cuobjdump took longer than {seconds:g} s", read=False)
    except OSError as error:
        return Code(problem=f"{name}: {error.strerror or error}", read=False)
    except (elf.BadElf, codedigest.NoCode) as error:
        return Code(problem=f"{name}: {error}", read=False)


def holds_code(path: str | os.PathLike[str]) -> bool:
    """Whether a file may hold GPU code: False only for a whole host library without any."""
    try:
        with codedigest.mapped(os.fspath(path)) as data:
            parsed = elf.parse(data)
    except (elf.BadElf, OSError):
        return True
    return parsed.machine == elf.EM_CUDA or any(s.size for s in codedigest.fatbins(parsed))


@contextlib.contextmanager
def _cubins(path: str, seconds: float) -> Iterator[tuple[tuple[str, ...], float]]:
    """The cubins in a file, which may be one itself, and how long taking them out took."""
    with codedigest.mapped(path) as data:
        parsed = elf.parse(data)
    if parsed.machine == elf.EM_CUDA:
        yield (path,), 0.0
        return
    if not any(s.size for s in codedigest.fatbins(parsed)):
        raise codedigest.NoCode("it is a host library without GPU code")
    start = time.monotonic()
    with codedigest.extracted(path, seconds) as files:
        if not files:
            raise codedigest.NoCode(codedigest.PTX_ONLY)
        yield files, time.monotonic() - start


def _code(
    files: Sequence[str],
    sm: int | None,
    progress: Progress | None,
    deadline: float,
    memory: int,
    name: str,
    took: float,
    only: str | None,
) -> Code:
    cubins = [_cubin(file, only) for file in files]
    words = [word for cubin in cubins for word in cubin.words]
    # The same code is often in several cubins; once is enough.
    unique = {(c.sm, c.words): c for c in cubins if c.words and (sm is None or runs_on(c.sm, sm))}
    wanted = sorted(unique.values(), key=lambda c: -c.size)
    found: list[ArchKernel] = []
    problems: list[str] = []
    if wanted:
        tool = codedigest.disassembler(TOOL)
        if tool is None:
            raise codedigest.NoCode(
                f"no disassembler: {TOOL} is not on PATH, in CUDA_HOME or in a wheel"
                " (pip install nvidia-cuda-nvdisasm)"
            )
        room = _Room(memory)
        total, done, lock = sum(c.size for c in wanted), 0, threading.Lock()

        def one(cubin: _Cubin) -> tuple[list[sass.Kernel], str | None, float]:
            nonlocal done
            with room.taken(_BASE + _FACTOR * cubin.size):
                sections = len(cubin.symbols or cubin.words)
                result = disassembled(tool, cubin.path, sections, deadline, cubin.symbols)
            with lock:
                done += cubin.size
                if progress:
                    progress(name, done, total)
            return result

        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
            for cubin, (kernels, problem, spent) in zip(wanted, pool.map(one, wanted), strict=True):
                found += [ArchKernel(cubin.sm, kernel) for kernel in kernels]
                took += spent
                if problem:
                    problems.append(problem)
    return Code(
        kernels=tuple(found),
        sms=tuple(sorted({c.sm for c in cubins})),
        digest=codedigest.total(words) if words else None,
        problem=f"{name}: {problems[0]}" if problems else None,
        tool_seconds=took,
    )


def _cubin(path: str, only: str | None) -> _Cubin:
    with codedigest.mapped(path) as data:
        parsed = elf.parse(data)
        words = tuple(sorted(codedigest.kernel_words(data, parsed)))
        symbols = () if only is None else around(only, elf.functions(data, parsed))
        return _Cubin(path, sm_of(data, parsed), len(data), words, symbols)


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
    tool: str, path: str, sections: int, deadline: float, symbols: Sequence[int] = ()
) -> tuple[list[sass.Kernel], str | None, float]:
    """(the kernels, why some are missing, seconds waited for nvdisasm).

    sections: how many sections of machine code the cubin has, or that `symbols`, indices into its
    symbol table, are in; all must have come out.
    """
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
        [tool, "-c", *(("-fun", ",".join(map(str, symbols))) if symbols else ()), path],
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
        kernels = list(sass.kernels(counted()))
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
    """Memory that those running at once may take; one that needs more than all runs alone."""

    def __init__(self, size: int) -> None:
        self._size = self._free = max(1, size)
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()
