"""The code digest: what identifies a build's machine code, whatever it is called and wherever.

Two builds of one source give different ``.so`` files and the same kernel instructions; a fix under
the same version number gives other instructions. So: SHA-256 over the sorted hashes of the
kernels' machine-code words, without names. A library without GPU code is identified by its host
``.text`` section.
"""

from __future__ import annotations

import glob
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import elf

TIMEOUT = 120.0
"""Seconds cuobjdump may take for one library; it reads about 90 MB a second."""
TOOL = "cuobjdump"

_FATBIN = (".nv_fatbin", "__nv_relfatbin")
_WHEELS = ("nvidia/cu*/bin", "nvidia/cuda_cuobjdump/bin", "triton/backends/nvidia/bin")


@dataclass(frozen=True, slots=True)
class CodeDigest:
    """`value` is hex, or None with the reason in `how`; `kernels` counts GPU kernels."""

    value: str | None
    kernels: int
    how: str


def of(path: str | os.PathLike[str]) -> CodeDigest:
    """The digest of one ``.cubin``, ``.so`` or ``.o``. Never raises for what the file holds."""
    return combined([path])


def combined(paths: Iterable[str | os.PathLike[str]]) -> CodeDigest:
    """One digest over the code of several files; their order and names do not matter.

    A single file that cannot be read through makes the whole unknown: a digest of the rest would
    claim more than was seen.
    """
    words: list[str] = []
    kernels = 0
    hows: list[str] = []
    for path in paths:
        try:
            found, count, how = _code(os.fspath(path))
        except (elf.BadElf, OSError, subprocess.SubprocessError, _NoCode) as error:
            return CodeDigest(None, 0, f"{os.path.basename(path)}: {_sentence(error)}")
        words += found
        kernels += count
        if how not in hows:
            hows.append(how)
    if not words:
        return CodeDigest(None, 0, "no files with machine code")
    total = hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()
    return CodeDigest(total, kernels, ", ".join(hows))


class _NoCode(Exception):
    """There is code we cannot get at, or none at all."""


def _code(path: str) -> tuple[list[str], int, str]:
    """(a hash per kernel or text section, how many kernels, how they were found)."""
    with _mapped(path) as data:
        parsed = elf.parse(data)
        if parsed.machine == elf.EM_CUDA:
            found = _kernels(data, parsed)
            if not found:
                raise _NoCode("the cubin has no kernels")
            return found, len(found), "cubin"
        if not any(s.size for prefix in _FATBIN for s in parsed.named(prefix)):
            text = [s for s in parsed.sections if s.name == ".text" and s.size]
            if not text:
                raise _NoCode("the file has no machine code")
            return [_hash(data, s) for s in text], 0, "host text"
    found = _extracted(path)
    return found, len(found), TOOL


def _extracted(path: str) -> list[str]:
    tool = disassembler()
    if tool is None:
        raise _NoCode(f"no disassembler: {TOOL} is not on PATH, in CUDA_HOME or in a wheel")
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fp4tune-") as folder:
        done = subprocess.run(
            [tool, "-xelf", "all", os.path.abspath(path)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise _NoCode(f"{TOOL} failed: {said[-1] if said else done.returncode}")
        for name in os.listdir(folder):
            with _mapped(os.path.join(folder, name)) as data:
                found += _kernels(data, elf.parse(data))
    if not found:
        raise _NoCode("its GPU code is PTX only: the driver compiles it when it is loaded")
    return found


def _kernels(data: memoryview, parsed: elf.Elf) -> list[str]:
    return [_hash(data, section) for section in parsed.named(".text.") if section.size]


def _hash(data: memoryview, section: elf.Section) -> str:
    return hashlib.sha256(data[section.offset : section.offset + section.size]).hexdigest()


def disassembler() -> str | None:
    """Where cuobjdump is: PATH, CUDA_HOME or CUDA_PATH, the usual place, an installed wheel."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home]
    for base in sys.path:
        for wheel in _WHEELS:
            places += sorted(glob.glob(os.path.join(glob.escape(base or "."), wheel)), reverse=True)
    return shutil.which(TOOL) or shutil.which(TOOL, path=os.pathsep.join(places))


@contextmanager
def _mapped(path: str) -> Iterator[memoryview]:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise elf.BadElf("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                yield view
            finally:
                view.release()


def _sentence(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{TOOL} took longer than {TIMEOUT:g} s"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
