"""Where a kernel's parameters stand in its constant bank, from a cubin's ``.nv.info`` sections.

Attributes there are a byte of format, a byte of kind and 16 bits, of value or of the size of what
follows. A parameter's has its ordinal and offset (16 bits each, after 32) and its size above bit 18
of the last word; the bank's has its offset and size. Compared with nvcc 13.0's code for SM90 and
SM120. Kernels whose parameters do not add up to the size of their bank's part are left out.
"""

from __future__ import annotations

import struct

from ...machine import elf

_STRING, _PARAMETER, _BANK = 0x04, 0x17, 0x0A

Parameters = tuple[tuple[int, int], ...]
"""(offset in the constant bank, size in bytes) of each parameter, in order."""


def of_kernels(data: bytes | memoryview, parsed: elf.Elf) -> dict[str, Parameters]:
    """By kernel, of those whose parameters are told completely."""
    found = {}
    for section in parsed.named(".nv.info."):
        at, end = section.offset, section.offset + section.size
        told: dict[int, tuple[int, int]] = {}
        base = bank = 0
        while at + 4 <= end:
            kind, attribute, size = struct.unpack_from("<BBH", data, at)
            at += 4
            if kind != _STRING:
                continue
            if at + size > end:
                break
            if attribute == _PARAMETER and size == 12:
                _, ordinal, offset, packed = struct.unpack_from("<IHHI", data, at)
                told[ordinal] = offset, packed >> 18
            elif attribute == _BANK and size == 8:
                _, base, bank = struct.unpack_from("<IHH", data, at)
            at += size
        whole = sorted(told) == list(range(len(told)))
        if whole and max((sum(each) for each in told.values()), default=0) == bank:
            name = section.name.removeprefix(".nv.info.")
            found[name] = tuple((base + offset, size) for _, (offset, size) in sorted(told.items()))
    return found
