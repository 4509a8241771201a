"""Enough of ELF to find sections: host libraries and CUDA's cubins are both ELF files.

Layouts from the "Tool Interface Standard ELF specification" (64-bit, little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

EM_CUDA = 190
MAGIC = b"\x7fELF"
_NOBITS = 8


class BadElf(ValueError):
    """Not a 64-bit little-endian ELF file, or one that is cut off."""


@dataclass(frozen=True, slots=True)
class ElfSection:
    name: str
    offset: int
    size: int
    """In bytes of the file; 0 for a section that takes no room in it."""
    address: int = 0
    kind: int = 0
    flags: int = 0
    link: int = 0
    info: int = 0
    """These as ELF has them: where it is loaded, and what other sections it belongs to."""
    length: int = 0
    """In bytes of memory."""


@dataclass(frozen=True, slots=True)
class Elf:
    machine: int
    flags: int
    sections: tuple[ElfSection, ...]

    def named(self, prefix: str) -> Iterator[ElfSection]:
        return (s for s in self.sections if s.name.startswith(prefix))


def parse(data: bytes | memoryview) -> Elf:
    """The sections of an ELF file.

    Raises BadElf; also for a file whose sections reach past its end, which disassemblers report
    as a clean host library.
    """
    if len(data) < 64 or bytes(data[:4]) != MAGIC:
        raise BadElf("not an ELF file")
    if data[4] != 2 or data[5] != 1:
        raise BadElf("not a 64-bit little-endian ELF file")
    machine = struct.unpack_from("<H", data, 18)[0]
    programs, table = struct.unpack_from("<QQ", data, 32)
    (flags,) = struct.unpack_from("<I", data, 48)
    segment, segments, size, count, names = struct.unpack_from("<HHHHH", data, 54)
    # A cubin's program headers come last: what is missing at the end shows there.
    if programs + segment * segments > len(data):
        raise BadElf("the file is cut off inside its program headers")
    if table == 0:
        return Elf(machine, flags, ())
    if size < 64 or table + size > len(data):
        raise BadElf("the file is cut off before its section table")
    first = _header(data, table)
    # Counts past 16 bits are kept in the first section's header.
    count = count or first.size
    names = first.link if names == 0xFFFF else names
    if table + size * count > len(data) or names >= max(count, 1):
        raise BadElf("the file is cut off inside its section table")
    raw = [_header(data, table + i * size) for i in range(count)]
    if any(h.kind != _NOBITS and h.offset + h.size > len(data) for h in raw):
        raise BadElf("the file is cut off: a section reaches past its end")
    if not raw:
        return Elf(machine, flags, ())
    strings = bytes(data[raw[names].offset : raw[names].offset + raw[names].size])
    return Elf(
        machine,
        flags,
        tuple(
            ElfSection(
                _string(strings, h.name),
                h.offset,
                0 if h.kind == _NOBITS else h.size,
                h.address,
                h.kind,
                h.flags,
                h.link,
                h.info,
                h.size,
            )
            for h in raw
        ),
    )


@dataclass(frozen=True, slots=True)
class ElfFunction:
    """A function's symbol. `index` is its place in the symbol table."""

    index: int
    name: str
    section: ElfSection
    other: int
    """Visibility, and what a machine adds to it: `CUDA_ENTRY` for a kernel."""


CUDA_ENTRY = 0x10
_SYMBOL = struct.Struct("<IBBHQQ")
_FUNC = 2


def functions(data: bytes | memoryview, parsed: Elf) -> Iterator[ElfFunction]:
    """The functions in the symbol table, where there is one."""
    tables = {section.name: section for section in parsed.sections}
    table, names = tables.get(".symtab"), tables.get(".strtab")
    if table is None or names is None:
        return
    strings = bytes(data[names.offset : names.offset + names.size])
    entries = data[table.offset : table.offset + table.size - table.size % _SYMBOL.size]
    for index, symbol in enumerate(_SYMBOL.iter_unpack(entries)):
        name, info, other, section, _, _ = symbol
        if info & 0xF == _FUNC and 0 < section < len(parsed.sections):
            yield ElfFunction(index, _string(strings, name), parsed.sections[section], other)


class _Header(NamedTuple):
    """A section header. `name`: where its name begins in the section of names."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int


def _header(data: bytes | memoryview, at: int) -> _Header:
    """The section header at `at`."""
    return _Header(*struct.unpack_from("<IIQQQQII", data, at))


def _string(strings: bytes, at: int) -> str:
    return strings[at : strings.find(b"\0", at)].decode(errors="replace")
