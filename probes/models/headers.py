"""Safetensors headers: names, dtypes and shapes of the tensors in a file, and nothing else of it.

The format is a 64-bit little-endian length, a JSON header of that length (name -> dtype, shape,
data_offsets), and the data: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...machine import files

_MOST_HEADER = 100_000_000
"""What the format itself allows."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_POINTER = b"version https://git-lfs"


class TensorHeader(msgspec.Struct, frozen=True, gc=False):
    """What a header says of one tensor; offsets count bytes from the end of the header."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (-1, -1)

    @property
    def sound(self) -> bool:
        """Whether dtype, shape and offsets agree. A dtype not known here may be of any size."""
        start, stop = self.data_offsets
        if not self.dtype or not 0 <= start <= stop or any(x < 0 for x in self.shape):
            return False
        bits = _BITS.get(self.dtype)
        return bits is None or math.prod(self.shape) * bits == 8 * (stop - start)


_DECODER = msgspec.json.Decoder(dict[str, TensorHeader])


@dataclass(frozen=True, slots=True)
class FileHeader:
    """One file's tensors by name; `begin` is where its data begin, `size` what it holds in all.

    `raw` are the header's bytes.
    """

    file: Path
    tensors: dict[str, TensorHeader]
    begin: int
    size: int
    raw: bytes

    @property
    def whole(self) -> bool:
        """Whether the file is as long as its header says."""
        last = next(reversed(self.tensors.values()), None)
        if last is None or self.begin + last.data_offsets[1] == self.size:
            return True  # as writers have it: the last one ends the file
        ends = (each.data_offsets[1] for each in self.tensors.values())
        return self.begin + max(ends) <= self.size


def read_header(file: Path) -> FileHeader:
    """The header of a safetensors file. Raises ValueError, one sentence, where it has none."""
    try:
        with files.opened(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            first = opened.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(_MOST_HEADER, size - 8):
                opened.seek(0)
                if opened.read(len(_POINTER)) == _POINTER:
                    raise ValueError(f"{file} is a Git LFS pointer: the file itself is not here")
                raise ValueError(f"{file} is no whole safetensors file")
            raw = opened.read(length)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    try:
        tensors = _DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{file} has no safetensors header") from None
    tensors.pop("__metadata__", None)
    return FileHeader(file, tensors, 8 + length, size, raw)
