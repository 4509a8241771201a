"""The code digest: what identifies a build's machine code, whatever it is called and wherever.

Two builds of one source give different ``.so`` files and the same kernel instructions; a fix under
the same version number gives other instructions. So: SHA-256 over the sorted hashes of the
kernels' machine-code words, without names. A library without GPU code is identified by its host
``.text`` section. What has PTX alone for a GPU is compiled by that node's driver: of such code the
PTX is hashed, and the driver's version with it.
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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from . import elf, fatbin, files

TIMEOUT = 120.0
"""Seconds cuobjdump may take for one library; it reads about 90 MB a second."""
TOOL = "cuobjdump"

PTX_ONLY = "its GPU code is PTX only: the driver compiles it when it is loaded"

_FATBIN = (".nv_fatbin", "__nv_relfatbin")
_WHEELS = (
    "nvidia/cu*/bin",
    "nvidia/cuda_cuobjdump/bin",
    "nvidia/cuda_nvdisasm/bin",
    "triton/backends/nvidia/bin",
)


@dataclass(frozen=True, slots=True)
class CodeDigest:
    """`value` is hex, or None with the reason in `how`; `kernels` counts GPU kernels. `compiled` is
    the digest of what the GPU's driver compiles, with its version; None where it compiles nothing.
    """

    value: str | None
    kernels: int
    how: str
    compiled: str | None = None


@dataclass(frozen=True, slots=True)
class DriverCompiler:
    """What compiles PTX on a node: the GPU's SM, and the driver's `version`, None if not known."""

    sm: int
    version: str | None


def compiler(sm: int | None, facts: Mapping[str, Any]) -> DriverCompiler | None:
    """What compiles PTX on a node with a GPU of those `hardware` facts; None for the CPU's."""
    return None if sm is None else DriverCompiler(sm, facts.get("driver"))


def of(path: str | os.PathLike[str]) -> CodeDigest:
    """The digest of one ``.cubin``, ``.so`` or ``.o``. Never raises for what the file holds."""
    return combined([path])


def combined(
    paths: Iterable[str | os.PathLike[str]], compiler: DriverCompiler | None = None
) -> CodeDigest:
    """One digest over the code of several files; their order and names do not matter.

    `compiler`: whose PTX is digested besides; None for a node without a GPU. A single file that
    cannot be read through makes the whole unknown: a digest of the rest would claim more than was
    seen.
    """
    words: list[str] = []
    ptx: list[str] = []
    kernels = 0
    hows: list[str] = []
    for path in paths:
        try:
            compiled = [] if compiler is None else _ptx(os.fspath(path), compiler.sm)
            ptx += compiled
            found, count, how = _code_hashes(os.fspath(path), bool(compiled))
        except (elf.BadElf, OSError, subprocess.SubprocessError, NoCode) as error:
            return CodeDigest(None, 0, f"{os.path.basename(path)}: {_tool_failure(error)}")
        words += found
        kernels += count
        if how not in hows:
            hows.append(how)
    by_driver = None
    if ptx and compiler is not None:
        by_driver = total([*ptx, f"driver {compiler.version} SM{compiler.sm}"])
    if not words and by_driver is None:
        return CodeDigest(None, 0, "no files with machine code")
    return CodeDigest(total(words) if words else by_driver, kernels, ", ".join(hows), by_driver)


def total(words: Iterable[str]) -> str:
    """The digest of kernels whose own hashes are `words`, in any order."""
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()


class NoCode(Exception):
    """There is code we cannot get at, or none at all."""


def _code_hashes(path: str, ptx: bool = False) -> tuple[list[str], int, str]:
    """(a hash per kernel or text section, how many kernels, how they were found). Nothing but PTX
    is enough where that is digested, too."""
    with mapped(path) as data:
        parsed = elf.parse(data)
        if parsed.machine == elf.EM_CUDA:
            found = kernel_words(data, parsed)
            if not found:
                raise NoCode("the cubin has no kernels")
            return found, len(found), "cubin"
        if not any(s.size for s in fatbins(parsed)):
            text = [s for s in parsed.sections if s.name == ".text" and s.size]
            if not text:
                raise NoCode("the file has no machine code")
            return [_hash(data, s) for s in text], 0, "host text"
        images = [image for module in _fatbin_images(data, parsed) for image in module]
        if images and all(image.ptx for image in images):
            if ptx:
                return [], 0, "PTX"
            raise NoCode(PTX_ONLY)
    found = []
    with extracted(path) as cubins:
        for name in cubins:
            with mapped(name) as data:
                found += kernel_words(data, elf.parse(data))
    if not found:
        raise NoCode(PTX_ONLY)
    return found, len(found), TOOL


def _ptx(path: str, sm: int) -> list[str]:
    """A hash of the PTX of each fatbin of a host library for which the driver compiles that for an
    `sm` GPU: as it is stored, so that another compression counts as another code."""
    found = []
    with mapped(path) as data:
        for module in _fatbin_images(data, elf.parse(data)):
            word, image = fatbin.coverage(module, sm)
            if word == fatbin.DRIVER and image is not None:
                begin, end = image.data
                found.append(hashlib.sha256(data[begin:end]).hexdigest())
    return found


def _fatbin_images(data: memoryview, parsed: elf.Elf) -> Iterator[list[fatbin.Image]]:
    """The images of each fatbin of a host library; none of a cubin."""
    for section in () if parsed.machine == elf.EM_CUDA else fatbins(parsed):
        yield from fatbin.modules(data, section.offset, section.offset + section.size)


@contextmanager
def extracted(
    path: str | os.PathLike[str], timeout: float | None = None
) -> Iterator[tuple[str, ...]]:
    """The cubins inside one host library or object, as files that last as long as the context.

    They are written to the temporary folder, so that memory does not grow with the library.
    Raises NoCode where there is no disassembler or it fails, and subprocess.TimeoutExpired.
    """
    tool = disassembler()
    if tool is None:
        raise NoCode(f"no disassembler: {TOOL} is not on PATH, in CUDA_HOME or in a wheel")
    with tempfile.TemporaryDirectory(prefix="fp4tune-") as folder:
        done = subprocess.run(
            [tool, "-xelf", "all", os.path.abspath(path)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT if timeout is None else timeout,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise NoCode(f"{TOOL} failed: {said[-1] if said else done.returncode}")
        yield tuple(os.path.join(folder, name) for name in sorted(os.listdir(folder)))


def fatbins(parsed: elf.Elf) -> Iterator[elf.ElfSection]:
    """The sections of a host library or object that hold GPU code."""
    return (section for prefix in _FATBIN for section in parsed.named(prefix))


def kernel_words(data: memoryview, parsed: elf.Elf) -> list[str]:
    """The hash of each kernel's machine code in a cubin."""
    return [_hash(data, section) for section in parsed.named(".text.") if section.size]


def words_by_kernel(data: memoryview, parsed: elf.Elf) -> dict[str, str]:
    """The same hashes by the kernel's (mangled) name."""
    return {
        section.name.removeprefix(".text."): _hash(data, section)
        for section in parsed.named(".text.")
        if section.size
    }


def _hash(data: memoryview, section: elf.ElfSection) -> str:
    return hashlib.sha256(data[section.offset : section.offset + section.size]).hexdigest()


def disassembler(tool: str = TOOL) -> str | None:
    """Where cuobjdump is: PATH, CUDA_HOME or CUDA_PATH, the usual place, an installed wheel."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home]
    for base in sys.path:
        for wheel in _WHEELS:
            places += sorted(glob.glob(os.path.join(glob.escape(base or "."), wheel)), reverse=True)
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(places))


@contextmanager
def mapped(path: str) -> Iterator[memoryview]:
    with files.opened(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise elf.BadElf("the file is empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(mapped)
        try:
            yield view
        finally:
            # An exception on its way may still hold a part of it, which then closes it at its end.
            with suppress(BufferError):
                view.release()
                mapped.close()


def _tool_failure(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{TOOL} took longer than {TIMEOUT:g} s"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
