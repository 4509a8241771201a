"""A checkpoint of safetensors files: what tensors it has, and their bytes piece by piece.

The format is a 64-bit little-endian length, a JSON header of that length (name -> dtype, shape,
data_offsets), and the data: https://huggingface.co/docs/safetensors. Read with the standard
library: nothing here needs an array, and no tensor is ever in memory as a whole. Files are read,
not mapped, so that one that shrinks is an error and not a fault of the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE = 8 << 20
"""Bytes read at a time."""
INDEX = "model.safetensors.index.json"
_MOST_HEADER = 100_000_000
"""What the format itself allows."""
_MOST_INDEX = 1 << 28
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: `nbytes` bytes from `start` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`entries` by name. `identity` is a digest of all headers and of every file's inode, size and
    time of change: another checkpoint, or this one changed, has another."""

    path: str
    entries: Mapping[str, Entry]
    identity: str
    nbytes: int


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a folder, its index, or one safetensors file.

    Headers only are read. Raises ValueError, one sentence, for what is none, or not whole.
    """
    files, listed = _files(path)
    sha = hashlib.sha256()
    entries: dict[str, Entry] = {}
    total = 0
    for file in files:
        header, size = _header(file)
        found = os.stat(file)
        sha.update(hashlib.sha256(header[1]).digest())
        sha.update(f"{file.name}|{found.st_ino}|{size}|{found.st_mtime_ns}\n".encode())
        total += size
        for entry in _entries(file, *header, size):
            if entry.name in entries:
                raise ValueError(f"{file}: the tensor {entry.name!r} is in another file, too")
            entries[entry.name] = entry
    for name, shard in listed.items():
        if name not in entries or Path(entries[name].file).name != shard:
            raise ValueError(f"{path}: the index has {name!r} in {shard}, where it is not")
    return Checkpoint(os.path.realpath(path), entries, sha.hexdigest(), total)


def pieces(
    entry: Entry, start: int = 0, stop: int | None = None, fd: int | None = None
) -> Iterator[bytes]:
    """The bytes `start` to `stop` of a tensor, `PIECE` at most at a time; `fd` is its file, where
    that is open already. Raises ValueError where the file ends before them."""
    at, end = start, entry.nbytes if stop is None else stop
    with ExitStack() as stack:
        if fd is None:
            fd = stack.enter_context(open(entry.file, "rb", buffering=0)).fileno()
        while at < end:
            piece = os.pread(fd, min(PIECE, end - at), entry.start + at)
            if not piece:
                raise ValueError(f"{entry.file} ends inside {entry.name!r}: it has changed")
            yield piece
            at += len(piece)


def numbers(entry: Entry) -> Iterator[float]:
    """The elements of a tensor of F64, F32, F16 or BF16. Raises ValueError for another dtype."""
    code = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}.get(entry.dtype)
    if code is None:
        raise ValueError(f"{entry.name!r} is {entry.dtype}, which is no floating-point number")
    size = struct.calcsize(code)
    rest = b""
    for piece in pieces(entry):
        piece = rest + piece
        whole = len(piece) - len(piece) % size
        for (value,) in struct.iter_unpack(f"<{code}", piece[:whole]):
            # bf16 is the upper half of a float32.
            yield struct.unpack("<f", struct.pack("<I", value << 16))[0] if code == "H" else value
        rest = piece[whole:]


def _files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files, and where the index says that each tensor is (nothing without one)."""
    try:
        if path.is_dir():
            if (path / INDEX).is_file():
                return _indexed(path / INDEX)
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise ValueError(f"{path} holds no safetensors file")
            if len(files) > 1:
                raise ValueError(f"{path} holds {len(files)} safetensors files and no {INDEX}")
            return files, {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    return _indexed(path) if path.suffix == ".json" else ([path], {})


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        if index.stat().st_size > _MOST_INDEX:
            raise ValueError(f"{index} is too large for an index")
        listed = json.loads(index.read_bytes())["weight_map"]
        good = isinstance(listed, dict) and len(listed) > 0
        good = good and all(isinstance(shard, str) for shard in listed.values())
    except OSError as error:
        raise ValueError(f"{index} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{index} is no index of safetensors files")
    for shard in set(listed.values()):
        if shard != os.path.basename(shard) or shard in ("", ".", ".."):
            raise ValueError(f"{index} names {shard[:80]!r}, which is no file beside it")
    files = sorted(index.parent / shard for shard in set(listed.values()))
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing: the index names it")
    return files, listed


def _header(file: Path) -> tuple[tuple[int, bytes], int]:
    """((where the data begins, the header's bytes), the file's size)."""
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            first = opened.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(_MOST_HEADER, size - 8):
                raise ValueError(f"{file} is no whole safetensors file")
            return (8 + length, opened.read(length)), size
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def _entries(file: Path, begin: int, header: bytes, size: int) -> Iterator[Entry]:
    try:
        document = json.loads(header)
        named = [(name, about) for name, about in document.items() if name != "__metadata__"]
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{file} has no safetensors header") from None
    for name, about in named:
        entry = _entry(file, begin, size, name, about)
        if entry is None:
            raise ValueError(f"{file}: {name[:80]!r} is not where its header says")
        yield entry


def _entry(file: Path, begin: int, size: int, name: str, about: Any) -> Entry | None:
    try:
        dtype, shape, (start, stop) = about["dtype"], about["shape"], about["data_offsets"]
        whole = all(type(x) is int and x >= 0 for x in (*shape, start, stop))
        if not (isinstance(dtype, str) and whole and start <= stop and begin + stop <= size):
            return None
        # A dtype that is not known here may be of any size: it is nobody's scale.
        if dtype in _BITS and math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
            return None
        return Entry(name, dtype, tuple(shape), str(file), begin + start, stop - start)
    except (KeyError, TypeError, ValueError):
        return None
