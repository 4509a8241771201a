"""A host library or object as it would lie in memory: sections, relocations, imports, functions.

x86-64 ELF only ("System V ABI, AMD64 supplement"). An object's sections are laid one behind the
other; what is not defined in the file gets an address of its own in a range nothing else uses.
"""

from __future__ import annotations

import bisect
import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from ...machine import elf

EM_X86_64 = 62
_ALLOCATED, _EXECUTABLE = 2, 4
_RELA, _NOBITS, _SYMTAB, _DYNSYM = 4, 8, 2, 11
# In an object, where instructions reach no further than 2 GB, and in a linked library.
_IMPORTS = {False: 0x4000_0000, True: 1 << 60}
_SLOTS = 0x6000_0000
_FATBINS = 1 << 40
_FUNCTION = 2
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_JUMP = re.compile(rb"\xff\x25(....)", re.DOTALL)
_LEA_OR_LOAD = re.compile(
    rb"[\x48\x4c](?:\x8d|\x8b)[\x05\x0d\x15\x1d\x25\x2d\x35\x3d](....)", re.DOTALL
)
_CALL = re.compile(rb"[\xe8\xe9](....)", re.DOTALL)
_CALL_SLOT = re.compile(rb"\xff[\x15\x25](....)", re.DOTALL)


@dataclass(slots=True)
class _Part:
    """A section in memory."""

    start: int
    data: bytes
    code: bool
    linkage: bool = False
    """Whether it is a procedure linkage table: jumps to what is defined elsewhere."""

    @property
    def end(self) -> int:
        return self.start + len(self.data)


@dataclass(slots=True)
class HostImage:
    """What a host file holds, by address."""

    parts: list[_Part] = field(default_factory=list)
    words: dict[int, int] = field(default_factory=dict)
    """8-byte words that relocations set, by address."""
    imports: dict[int, str] = field(default_factory=dict)
    """Names of what is called and defined elsewhere, by the address that stands for it."""
    names: dict[str, int] = field(default_factory=dict)
    """Addresses of the functions that have a symbol."""
    functions: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) of each function, sorted."""
    offset_tables: list[tuple[int, int]] = field(default_factory=list)
    fatbins: list[tuple[int, int, int]] = field(default_factory=list)
    """(address, place in the file, size) of each section of GPU code."""
    stripped: bool = False
    """Whether it has no symbol table (imports apart)."""
    _starts: list[int] = field(default_factory=list)

    def function(self, address: int) -> tuple[int, int] | None:
        """The function an address lies in."""
        place = bisect.bisect_right(self.functions, (address, 1 << 62)) - 1
        if place >= 0 and self.functions[place][0] <= address < self.functions[place][1]:
            return self.functions[place]
        return None

    def part(self, address: int) -> _Part | None:
        if not self._starts:
            self.parts.sort(key=lambda part: part.start)
            self._starts = [part.start for part in self.parts]
        place = bisect.bisect_right(self._starts, address) - 1
        if place < 0 or address >= self.parts[place].end:
            return None
        return self.parts[place]

    def code(self, start: int, end: int) -> bytes:
        part = self.part(start)
        return part.data[start - part.start : end - part.start] if part else b""

    def word(self, address: int, size: int) -> int | None:
        """A constant of `size` bytes; None where it is not in the file."""
        if size == 8 and address in self.words:
            return self.words[address]
        part = self.part(address)
        if part is None or address + size > part.end:
            return None
        return int.from_bytes(part.data[address - part.start :][:size], "little")

    def text(self, address: int) -> str | None:
        """The string at an address."""
        part = self.part(address)
        if part is None:
            return None
        at = address - part.start
        end = part.data.find(b"\0", at)
        return part.data[at:end].decode(errors="replace") if end >= 0 else None

    def in_file(self, address: int) -> int | None:
        """Where in the file the GPU code at an address is."""
        for start, offset, size in self.fatbins:
            if start <= address < start + size:
                return offset + address - start
        return None

    def is_slot(self, place: int) -> bool:
        """Whether a word is one of the offset table, which code loads addresses from."""
        return place >= _SLOTS or any(start <= place < end for start, end in self.offset_tables)

    def target(self, address: int) -> int:
        """Where a call to `address` ends up, maybe through the procedure linkage table."""
        part = self.part(address)
        if part is None or not part.linkage:
            return address
        at = address - part.start
        match = _JUMP.search(part.data[at : at + 16])
        if match is None:
            return address
        slot = address + match.end() + struct.unpack("<i", match[1])[0]
        return self.words.get(slot, address)

    def linkage(self) -> dict[int, int]:
        """Each entry of the procedure linkage table, and what it jumps to."""
        found = {}
        for part in self.parts:
            if part.linkage:
                for at in range(0, len(part.data) - 7, 8):
                    target = self.target(part.start + at)
                    if target != part.start + at:
                        found[part.start + at] = target
        return found

    def calls(self, wanted: Collection[int]) -> Iterator[tuple[int, int]]:
        """(address, target) of what may be a direct call of, or jump to, one of `wanted`."""
        linkage = {entry: to for entry, to in self.linkage().items() if to in wanted}
        unpack = struct.Struct("<i").unpack
        for part in self.parts:
            if not part.code:
                continue
            start = part.start
            for match in _CALL.finditer(part.data):
                target = start + match.end() + unpack(match[1])[0]
                target = linkage.get(target, target)
                if target in wanted:
                    yield start + match.start(), target
            for match in _CALL_SLOT.finditer(part.data):
                slot = self.words.get(start + match.end() + unpack(match[1])[0])
                if slot is not None and slot in wanted:
                    yield start + match.start(), slot

    def references(self) -> Iterator[tuple[int, int]]:
        """(address, what is addressed) of code that takes an address, itself or from a slot."""
        for part in self.parts:
            if not part.code:
                continue
            for match in _LEA_OR_LOAD.finditer(part.data):
                place = part.start + match.end() + struct.unpack("<i", match[1])[0]
                lea = match[0][1] == 0x8D
                target = place if lea else self.words.get(place)
                if target is not None:
                    yield part.start + match.start(), target


def read(data: memoryview, parsed: elf.Elf) -> HostImage:
    """The image of an x86-64 file. Raises BadElf for tables that make no sense."""
    image = HostImage()
    try:
        where = _sections(data, parsed, image)
        symbols = _symbols(data, parsed, where, image)
        _relocate(data, parsed, where, symbols, image)
        _functions(data, parsed, image)
    except (struct.error, IndexError) as error:
        raise elf.BadElf("its symbols or relocations cannot be read") from error
    return image


def _sections(data: memoryview, parsed: elf.Elf, image: HostImage) -> list[int]:
    """Lay the sections out; the address of each."""
    linked = any(s.address for s in parsed.sections)
    where, at = [], 1 << 20
    for section in parsed.sections:
        if not section.flags & _ALLOCATED:
            where.append(0)
            continue
        start = section.address if linked else at
        where.append(start)
        if section.name.startswith(".got"):
            image.offset_tables.append((start, start + section.length))
        if section.name.startswith((".nv_fatbin", "__nv_relfat")):
            if not linked:
                where[-1] = start = _FATBINS + section.offset
            # Nothing on the host looks into it.
            image.fatbins.append((start, section.offset, section.size))
            continue
        at += (section.length + 63) & ~63
        if section.kind != _NOBITS:
            code = bool(section.flags & _EXECUTABLE)
            content = bytes(data[section.offset : section.offset + section.size])
            linkage = section.name.startswith(".plt")
            image.parts.append(_Part(start, content, code and not linkage, linkage))
    return where


Symbols = dict[int, list[tuple[int | None, str]]]
"""By section of symbols: the address and name of each, no address for what is not defined."""


def _symbols(data: memoryview, parsed: elf.Elf, where: list[int], image: HostImage) -> Symbols:
    found: Symbols = {}
    linked = any(s.address for s in parsed.sections)
    sized: list[tuple[int, int]] = []
    image.stripped = True
    for number, section in enumerate(parsed.sections):
        if section.kind not in (_SYMTAB, _DYNSYM):
            continue
        names = parsed.sections[section.link]
        strings = bytes(data[names.offset : names.offset + names.size])
        table = data[section.offset : section.offset + section.size // 24 * 24]
        rows: list[tuple[int | None, str]] = []
        for name, info, _, place, value, size in _SYMBOL.iter_unpack(table):
            text = strings[name : strings.find(b"\0", name)].decode(errors="replace")
            if place == 0 or place >= 0xFF00:
                rows.append((None, text))
                continue
            address = value if linked else where[place] + value
            rows.append((address, text))
            if info & 15 == _FUNCTION:
                image.names[text] = address
                if size:
                    sized.append((address, address + size))
        found[number] = rows
        if section.kind == _SYMTAB and len(rows) > 1:
            image.stripped = False
    image.functions = sized
    return found


def _relocate(
    data: memoryview, parsed: elf.Elf, where: list[int], symbols: Symbols, image: HostImage
) -> None:
    by_name: dict[str, int] = {}
    linked = any(s.address for s in parsed.sections)
    patched = {part.start: bytearray(part.data) for part in image.parts} if not linked else {}
    slots: dict[int, int] = {}

    def imported(name: str) -> int:
        if name not in by_name:
            by_name[name] = _IMPORTS[linked] + 16 * len(by_name)
            image.imports[by_name[name]] = name
        return by_name[name]

    for section in parsed.sections:
        if section.kind != _RELA:
            continue
        rows = symbols.get(section.link, [])
        base = 0 if linked else where[section.info]
        content = data[section.offset : section.offset + section.size // 24 * 24]
        if not linked and not parsed.sections[section.info].flags & _ALLOCATED:
            continue
        for offset, info, addend in _RELOCATION.iter_unpack(content):
            kind, index = info & 0xFFFFFFFF, info >> 32
            place = base + offset
            address, name = rows[index] if index < len(rows) else (None, "")
            value = imported(name) if address is None and name else (address or 0)
            if kind in (1, 6, 7, 8):  # a word: 64, GLOB_DAT, JUMP_SLOT, RELATIVE
                image.words[place] = value + (addend if kind in (1, 8) else 0)
            elif not linked and kind in (9, 41, 42):  # through a slot of the offset table
                slot = slots.setdefault(value, _SLOTS + 8 * len(slots))
                image.words[slot] = value
                _patch(patched, place, slot + addend - place, base)
            elif not linked and kind in (2, 4):  # relative to the instruction
                _patch(patched, place, value + addend - place, base)
            elif not linked and kind in (10, 11):
                _patch(patched, place, value + addend, base)
    for part in image.parts:
        if part.start in patched:
            part.data = bytes(patched[part.start])


def _patch(patched: dict[int, bytearray], place: int, value: int, base: int) -> None:
    part = patched.get(base)
    if part is not None:
        struct.pack_into("<I", part, place - base, value & 0xFFFFFFFF)


def _functions(data: memoryview, parsed: elf.Elf, image: HostImage) -> None:
    """Add the functions that the unwind tables tell; a stripped library has only those."""
    section = next((s for s in parsed.sections if s.name == ".eh_frame_hdr" and s.size), None)
    if section is not None and bytes(data[section.offset : section.offset + 4]) == b"\1\x1b\3\x3b":
        (count,) = struct.unpack_from("<I", data, section.offset + 8)
        for number in range(count):
            start, entry = struct.unpack_from("<ii", data, section.offset + 12 + 8 * number)
            size = image.word(section.address + entry + 12, 4)
            if size:
                image.functions.append((section.address + start, section.address + start + size))
    image.functions = sorted(set(image.functions))
