"""Is a module known to launch its kernels with PDL? From its host code, sources or metadata.

A kernel that never waits is only dangerous if it is launched before its predecessor has ended.
That is decided on the host, so no kernel's code can say it.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...machine import codedigest, elf

YES, NO, POSSIBLE, UNKNOWN = "yes", "no", "possible", "unknown"
_EM_X86_64 = 62


@dataclass(frozen=True, slots=True)
class Launch:
    """`pdl`: ``yes``, ``no``, ``possible`` (decided when it runs) or ``unknown``; `evidence`: how
    that is known."""

    pdl: str = UNKNOWN
    evidence: tuple[str, ...] = ()
    every: bool = False
    """Whether that holds for every launch of the module, as far as that can be read."""


def combined(found: Iterable[Launch]) -> Launch:
    """What several sources say together: one launch with PDL is enough."""
    found = list(found)
    every = any(each.pdl == YES and each.every for each in found)
    evidence = tuple(line for each in found for line in each.evidence)
    for pdl in (YES, POSSIBLE, NO):
        if any(each.pdl == pdl for each in found):
            return Launch(pdl, evidence, every)
    return Launch(UNKNOWN, evidence)


# --- host code -----------------------------------------------------------------------------

# `mov dword [base + displacement], 6`: opcode C7 /0, then the displacement, then the number.
_STORES_6 = re.compile(
    rb"\xc7(?:([\x40-\x43\x45-\x47]|\x44.)(.)|([\x80-\x83\x85-\x87]|\x84.)(....)|([\x00-\x03\x06\x07]|\x04.))"
    rb"\x06\x00\x00\x00",
    re.DOTALL,
)
_NEAR = 256
"""Bytes of code between setting the attribute's id and setting its value."""
_EXTENDED = (b"cudaLaunchKernelEx", b"cuLaunchKernelEx")
_PLAIN = (b"cudaLaunchKernel\0", b"cuLaunchKernel\0")
_INDIRECT = (b"cudaGetDriverEntryPoint", b"cuGetProcAddress", b"dlsym\0")


def of_host_code(path: Path) -> Launch:
    """From the machine code of the library or object that launches.

    ``cudaLaunchAttribute`` is an id (6: programmatic stream serialisation) and, 8 bytes further,
    its value (CUDA's driver_types.h). A compiler writes both as constants into the same record, so
    that the pair can be seen in x86-64 code. What is not seen is unknown, not absent.
    """
    try:
        with codedigest.mapped(str(path)) as data:
            parsed = elf.parse(data)
            if parsed.machine == elf.EM_CUDA:
                return Launch()
            names = [s for s in parsed.sections if s.name in (".dynstr", ".strtab")]
            imported = b"".join(bytes(data[s.offset : s.offset + s.size]) for s in names)
            if not any(name in imported for name in _EXTENDED):
                if any(n in imported for n in _PLAIN) and not any(n in imported for n in _INDIRECT):
                    line = "it imports no call that launches with attributes, so not with PDL"
                    return Launch(NO, (f"host code: {line}",))
                return Launch()
            if parsed.machine != _EM_X86_64:
                return Launch(
                    UNKNOWN, ("host code: launches with attributes; which is read on x86-64 only",)
                )
            places = sum(
                _attribute_stores(data[s.offset : s.offset + s.size]) for s in parsed.named(".text")
            )
    except (elf.BadElf, OSError):
        return Launch()
    if places:
        line = f"sets the PDL launch attribute to 1 in {places} places"
        return Launch(YES, (f"host code: {line}",))
    return Launch(UNKNOWN, ("host code: launches with attributes; PDL not seen among them",))


def _attribute_stores(code: memoryview) -> int:
    """Where id 6 and value 1 are written 8 bytes apart into one record."""
    count = 0
    for match in _STORES_6.finditer(code):
        short, disp8, long, disp32, bare = match.groups()
        if short is not None:
            base, at = short, struct.unpack("<b", disp8)[0]
        elif long is not None:
            base, at = long, struct.unpack("<i", disp32)[0]
        else:
            base, at = bare, 0
        near = bytes(code[max(0, match.start() - _NEAR) : match.end() + _NEAR])
        if any(store in near for store in _store_1(base, at + 8)):
            count += 1
    return count


def _store_1(base: bytes, at: int) -> list[bytes]:
    """The encodings of `mov dword [base + at], 1`. The register is in the low bits of `base`."""
    register, rest = base[0] & 7, base[1:]
    one = b"\x01\x00\x00\x00"
    wide = b"\xc7" + bytes([0x80 | register]) + rest + struct.pack("<i", at) + one
    if -128 <= at < 128:
        return [wide, b"\xc7" + bytes([0x40 | register]) + rest + struct.pack("<b", at) + one]
    return [wide]


# --- sources -------------------------------------------------------------------------------

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*")
_NAMES = r"(?:enable_?PDL|launch_with_pdl|enable_pdl|use_pdl)"
_ALWAYS = re.compile(
    rf"/\*\s*{_NAMES}\s*=?\s*\*/\s*true\b"
    r"|programmaticStreamSerializationAllowed\s*=\s*(?:1|true)\b"
    r"|\.run\([^;{}]*nullptr\s*,\s*true\s*\)"
)
_NEVER = re.compile(rf"/\*\s*{_NAMES}\s*=?\s*\*/\s*false\b")
_MAYBE = re.compile(
    rf"/\*\s*{_NAMES}\s*=?\s*\*/\s*\w+|programmaticStreamSerializationAllowed\s*=\s*\w+"
    r"|cudaLaunchAttributeProgrammaticStreamSerialization"
)
_WAITS = re.compile(r"griddepcontrol\.wait|cudaGridDependencySynchronize\s*\(")
_MOST_FILES = 2000


@dataclass(frozen=True, slots=True)
class Sources:
    """What a module's own sources say. `waits`: files with hand-written waits."""

    launch: Launch
    waits: tuple[str, ...]


def of_sources(sources: Sequence[Path], roots: Sequence[Path]) -> Sources:
    """Read `sources` and what they include from `roots` (CUTLASS and CUDA are no such root:
    they can do everything and decide nothing)."""
    evidence: dict[str, list[str]] = {YES: [], POSSIBLE: [], NO: []}
    waits = []
    todo, seen = list(sources), set(sources)
    while todo and len(seen) < _MOST_FILES:
        file = todo.pop()
        try:
            text = _COMMENT.sub("", file.read_text(errors="replace"))
        except OSError:
            continue
        for pdl, pattern in ((YES, _ALWAYS), (NO, _NEVER), (POSSIBLE, _MAYBE)):
            if match := pattern.search(text):
                said = " ".join(match.group(0).split())[-60:]
                evidence[pdl].append(f"source {file.name}: {said}")
                break
        if _WAITS.search(text):
            waits.append(file.name)
        for name in _INCLUDE.findall(text):
            for root in (file.parent, *roots):
                near = (root / name).resolve()
                if near not in seen and near.is_file() and _inside(near, roots, file.parent):
                    seen.add(near)
                    todo.append(near)
                    break
    only = sum(bool(lines) for lines in evidence.values()) == 1
    found = [
        Launch(pdl, tuple(sorted(lines)[:4]), only) for pdl, lines in evidence.items() if lines
    ]
    return Sources(combined(found), tuple(sorted(waits)))


def _inside(file: Path, roots: Sequence[Path], beside: Path) -> bool:
    return any(file.is_relative_to(root.resolve()) for root in (*roots, beside))


# --- metadata ------------------------------------------------------------------------------


def of_triton(cubin: Path) -> Launch:
    """From the JSON that Triton writes beside a cubin in its cache."""
    try:
        known = json.loads(cubin.with_suffix(".json").read_text())
        with_pdl = known["launch_pdl"]
    except (OSError, ValueError, KeyError, TypeError):
        return Launch()
    name = cubin.with_suffix(".json").name
    return Launch(YES if with_pdl else NO, (f"{name}: launch_pdl is {bool(with_pdl)}",), True)
