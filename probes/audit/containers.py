"""Files that GPU code comes in: cubins, host objects and libraries, archives of them, fatbins."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Iterator

from ...machine import codedigest, elf

ARCHIVE = b"!<arch>\n"
THIN_ARCHIVE = b"!<thin>\n"
FATBIN = struct.pack("<I", 0xBA55ED50)
"""How an archive and a fatbin of CUDA begin."""
NO_HEADERS = (
    "its section headers are gone (stripped or zeroed), so what it holds cannot be told: audit the"
    " file it was made from"
)
NO_GPU_CODE = "it is a host library without GPU code"


@contextlib.contextmanager
def cubins(path: str, seconds: float) -> Iterator[tuple[tuple[str, ...], float]]:
    """The cubins in a file, which may be one itself, and how long taking them out took.

    Raises BadElf or NoCode with a sentence, and subprocess.TimeoutExpired.
    """
    if is_cubin(path):
        yield (path,), 0.0
        return
    start = time.monotonic()
    with codedigest.extracted(path, seconds) as files:
        if not files:
            raise codedigest.NoCode(codedigest.PTX_ONLY)
        yield files, time.monotonic() - start


def is_cubin(path: str) -> bool:
    """Whether a file is a cubin itself, and not a file that holds some.

    Raises BadElf or NoCode for one that is neither.
    """
    with codedigest.mapped(path) as data:
        begin = bytes(data[:8])
        if begin == THIN_ARCHIVE:
            raise codedigest.NoCode("it is a thin archive: audit the objects that it names")
        if begin == ARCHIVE:
            if not any(_gpu_sections(member) for _, member in members(data)):
                raise codedigest.NoCode("it is an archive without GPU code")
            return False
        if begin[:4] == FATBIN:
            return False
        if begin[:4] != elf.MAGIC and _looks_like_text(data):
            raise elf.BadElf(_about_text(data))
        parsed = elf.parse(data)
        if not any(s.name or s.size for s in parsed.sections):
            raise elf.BadElf(NO_HEADERS)
        if parsed.machine == elf.EM_CUDA:
            return True
        if not any(s.size for s in codedigest.fatbins(parsed)):
            raise codedigest.NoCode(NO_GPU_CODE)
    return False


def _looks_like_text(data: memoryview) -> bool:
    begin = bytes(data[:512])
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in begin)


def _about_text(data: memoryview) -> str:
    begin = bytes(data[:4096])
    if begin.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself"
    if b"GNU ld script" in begin or b"GROUP (" in begin or b"INPUT (" in begin:
        return "it is a linker script: audit the library that it names"
    if b".version" in begin and b".target" in begin:
        return codedigest.PTX_ONLY
    return "it is a text file, not a library"


def may_hold_code(path: str) -> bool:
    """Whether a file may hold GPU code: False only for a whole host library without any."""
    try:
        with codedigest.mapped(path) as data:
            if bytes(data[:8]) in (ARCHIVE, THIN_ARCHIVE) or bytes(data[:4]) == FATBIN:
                return True
            parsed = elf.parse(data)
            if not any(s.name or s.size for s in parsed.sections):
                return True
            cuda = parsed.machine == elf.EM_CUDA
            return cuda or any(s.size for s in codedigest.fatbins(parsed))
    except (elf.BadElf, OSError):
        return True


def _gpu_sections(data: memoryview) -> bool:
    try:
        parsed = elf.parse(data)
    except elf.BadElf:
        return False
    return parsed.machine == elf.EM_CUDA or any(s.size for s in codedigest.fatbins(parsed))


def members(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """The files in an archive, as `ar` writes it (names may be cut). Raises BadElf if cut off."""
    at = len(ARCHIVE)
    while at + 60 <= len(data):
        header = bytes(data[at : at + 60])
        name = header[:16].decode(errors="replace").strip()
        try:
            size = int(header[48:58])
        except ValueError:
            raise elf.BadElf("its archive headers make no sense") from None
        at += 60
        if at + size > len(data):
            raise elf.BadElf("the archive is cut off")
        if name not in ("/", "//", "/SYM64/"):
            yield name.rstrip("/"), data[at : at + size]
        at += size + size % 2


def host_parts(data: memoryview) -> Iterator[memoryview]:
    """The host objects of a file: itself, or each of an archive."""
    if bytes(data[:8]) == ARCHIVE:
        yield from (member for _, member in members(data))
    elif bytes(data[:4]) == elf.MAGIC:
        yield data
