"""The machine code of what was loaded: which cubin a launched kernel is from, and how it waits."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...machine import codedigest, elf
from ..audit.disassemble import ReadLimits, machine_code_of
from ..audit.parameters import of_kernels
from ..audit.sass import NO_WAIT
from .kernels import UNKNOWN, Wait
from .shim import MOST_BYTES, RawBlob, RawFunction, RawLaunch

MOST_JUDGED = 32 << 20
"""Bytes of a cubin up to which it is disassembled here: larger ones take a minute and more."""
JUDGE_SECONDS = 20.0


@dataclass(slots=True)
class Cubin:
    """Machine code that was loaded: SHA-256 of each kernel's words, and its bytes while kept."""

    words: dict[str, str]
    parameters: dict[str, tuple[int, ...]]
    """Sizes of each kernel's parameters in bytes, where the cubin says so."""
    data: bytes | None
    waits: dict[str, Wait] = field(default_factory=dict)
    """By kernel, of those that were disassembled."""


@dataclass(slots=True)
class CodeBook:
    """All code a process was seen to load. `most`: bytes kept for disassembly."""

    most: int = MOST_BYTES
    _cubins: dict[str, Cubin] = field(default_factory=dict)
    _named: dict[str, list[Cubin]] = field(default_factory=dict)
    _loads: dict[int, list[tuple[int, Cubin | None]]] = field(default_factory=dict)
    _functions: dict[int, list[RawFunction]] = field(default_factory=dict)
    _size: int = 0

    def add(self, blobs: Sequence[RawBlob], functions: Sequence[RawFunction]) -> None:
        """Learn what was loaded, in order."""
        for blob in blobs:
            cubin = self._cubin(blob.data) if blob.data else None
            if blob.owner and (cubin or blob.loads):
                self._loads.setdefault(blob.owner, []).append((blob.seq, cubin))
        for function in functions:
            self._functions.setdefault(function.handle, []).append(function)

    def _cubin(self, data: bytes) -> Cubin | None:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._cubins:
            try:
                parsed = elf.parse(data)
            except elf.BadElf:
                return None
            if parsed.machine != elf.EM_CUDA:
                return None
            words = codedigest.words_by_kernel(memoryview(data), parsed)
            keep = self._size + len(data) <= self.most
            self._size += len(data) if keep else 0
            cubin = self._cubins[key] = Cubin(
                words, parameters(data, parsed), data if keep else None
            )
            for name in words:
                self._named.setdefault(name, []).append(cubin)
        return self._cubins[key]

    def candidates(self, launch: RawLaunch) -> list[Cubin]:
        """Cubins the launched kernel may be from: one where its module is known, else all that
        have a kernel of that name."""
        function = _latest(self._functions.get(launch.function, ()), launch.seq)
        owners = [launch.function]
        while function and function.owner and len(owners) < 4:
            owners.append(function.owner)
            # The module of a library: its code came with the library.
            function = _latest(self._functions.get(function.owner, ()), launch.seq)
        for owner in owners:
            loads = self._loads.get(owner, ())
            # A handle is used again after an unload; code may also be loaded by the launch itself.
            before = [cubin for seq, cubin in loads if seq < launch.seq][-1:]
            after = [cubin for seq, cubin in loads if seq > launch.seq][:1]
            for cubin in (*before, *after):
                if cubin and launch.name in cubin.words:
                    return [cubin]
        return self._named.get(launch.name, [])

    def digest(self, launch: RawLaunch) -> str | None:
        """SHA-256 of the kernel's words; None where its code was not seen, or is one of several."""
        words = {cubin.words[launch.name] for cubin in self.candidates(launch)}
        return words.pop() if len(words) == 1 else None

    def parameters(self, launch: RawLaunch) -> tuple[int, ...] | None:
        """Sizes of the kernel's parameters; None where unknown, or not the same in all cubins."""
        found = {cubin.parameters.get(launch.name) for cubin in self.candidates(launch)}
        return found.pop() if len(found) == 1 else None

    def wait(self, launch: RawLaunch) -> Wait:
        """How the kernel waits; disassembles it on first use."""
        found = self.candidates(launch)
        if not found:
            return Wait(UNKNOWN, how="its module was not seen when it was loaded")
        different = {cubin.words[launch.name]: cubin for cubin in found}
        waits = [_wait_of(cubin, launch.name) for cubin in different.values()]
        if len({wait.status for wait in waits}) > 1:
            return Wait(UNKNOWN, how=f"{len(waits)} loaded modules have different kernels so named")
        return waits[0]


def parameters(data: bytes, parsed: elf.Elf) -> dict[str, tuple[int, ...]]:
    """Sizes of each kernel's parameters in bytes, of kernels that tell them completely."""
    known = of_kernels(data, parsed)
    return {name: tuple(size for _, size in places) for name, places in known.items()}


def _latest(functions: Sequence[RawFunction], seq: int) -> RawFunction | None:
    return max((f for f in functions if f.seq < seq), key=lambda f: f.seq, default=None)


def _wait_of(cubin: Cubin, name: str) -> Wait:
    if name not in cubin.waits:
        if cubin.data is None:
            wait = Wait(UNKNOWN, how="its machine code was not kept, for want of room")
        elif len(cubin.data) > MOST_JUDGED:
            how = f"its module has {len(cubin.data) >> 20} MiB: audit it instead"
            wait = Wait(UNKNOWN, how=how)
        else:
            wait = disassembled(cubin.data, name)
        cubin.waits[name] = wait
    return cubin.waits[name]


def disassembled(data: bytes, name: str) -> Wait:
    """How the kernel `name` of a cubin waits, as the audit judges it."""
    with tempfile.TemporaryDirectory(prefix="fp4tune-census-") as folder:
        path = os.path.join(folder, "module.cubin")
        with open(path, "wb") as file:
            file.write(data)
        code = machine_code_of(path, limits=ReadLimits(JUDGE_SECONDS, only=name))
    for each in code.kernels:
        kernel = each.kernel
        if kernel.name != name:
            continue
        how = f"SASS SM{each.sm}: ACQBULK {kernel.waits}, PREEXIT {kernel.triggers}"
        if kernel.unfollowed:
            how += f", {len(kernel.unfollowed)} indirect branches not followed"
        if kernel.idle:
            how += ", the wait only after the last access"
        # One that comes when nothing is left to do holds nothing back.
        status = NO_WAIT if kernel.idle else kernel.wait
        return Wait(status, kernel.first_access, how)
    problem = (code.problem or "").removeprefix("module.cubin: ")
    return Wait(UNKNOWN, how=problem or "it was not disassembled")
