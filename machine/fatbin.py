"""What a fatbin holds: machine code and PTX, each for one architecture. Nothing is decompressed.

A fatbin is a header of 16 bytes (magic, version, size of the header, size of what follows) and
entries, each with a header of its own: kind (1 is PTX, 2 machine code), sizes, architecture, flags.
Read off the output of nvcc and fatbinary 13.0 for SM80 to SM121.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAGIC = 0xBA55ED50
_PTX, _CODE = 1, 2
_EXACT, _FAMILY = 1 << 20, 1 << 21


@dataclass(frozen=True, slots=True)
class Image:
    """Code for one architecture. `exact`: for that SM alone (``sm_90a``); `family`: for that SM
    and newer ones of its family (``sm_100f``)."""

    ptx: bool
    sm: int
    exact: bool = False
    family: bool = False
    data: tuple[int, int] = (0, 0)
    """Where its bytes, compressed or not, begin and end in what was read."""

    def runs_on(self, sm: int) -> bool:
        """Whether an `sm` GPU can use it: machine code as it is, PTX as the driver compiles it."""
        if self.exact:
            return self.sm == sm
        same = self.sm // 10 == sm // 10
        if self.ptx and not self.family:
            return self.sm <= sm
        return same and self.sm <= sm

    @property
    def name(self) -> str:
        return f"sm_{self.sm}{'a' if self.exact else 'f' if self.family else ''}"


def images(data: bytes | memoryview, start: int, end: int) -> Iterator[Image]:
    """The images of the fatbins that lie one behind the other in ``data[start:end]``."""
    for module in modules(data, start, end):
        yield from module


def modules(data: bytes | memoryview, start: int, end: int) -> Iterator[list[Image]]:
    """The same, by fatbin: the images of one are the same kernels for different SMs."""
    at = start
    while at + 16 <= end:
        magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
        if magic != MAGIC or header < 16:
            at += 8  # padding
            continue
        yield list(one(data, at, end))
        at += (header + size + 7) & ~7


def one(data: bytes | memoryview, at: int, end: int) -> Iterator[Image]:
    """The images of the fatbin that begins at `at`."""
    if at + 16 > end:
        return
    magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
    if magic != MAGIC:
        return
    last = min(end, at + header + size)
    at += header
    while at + 48 <= last:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
        (sm,) = struct.unpack_from("<I", data, at + 28)
        (flags,) = struct.unpack_from("<Q", data, at + 40)
        if header < 48:
            return
        if kind in (_PTX, _CODE):
            place = (at + header, min(last, at + header + size))
            exact, family = bool(flags & _EXACT), bool(flags & _FAMILY)
            yield Image(kind == _PTX, sm, exact, family, place)
        at += header + size


NATIVE, DRIVER, ABSENT = "native", "ptx", "absent"


def coverage(found: Iterable[Image], sm: int) -> tuple[str, Image | None]:
    """What an `sm` GPU would run of one module's images, as the driver chooses it.

    ``native`` machine code, ``ptx`` that the driver compiles, or ``absent``; and the image.
    """
    usable = [image for image in found if image.runs_on(sm)]
    for ptx, word in ((False, NATIVE), (True, DRIVER)):
        of_kind = [image for image in usable if image.ptx == ptx]
        if of_kind:
            return word, max(of_kind, key=lambda image: (image.sm, image.exact, image.family))
    return ABSENT, None
