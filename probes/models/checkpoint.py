"""A whole checkpoint of safetensors files: what tensors it has, and their bytes piece by piece.

Nothing here needs an array, and no tensor is ever in memory as a whole. Files are read, not mapped,
so that one that shrinks is an error and not a fault of the process.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...machine import files
from .headers import FileHeader, read_header
from .place import INDEX, find_files

_MOST_BESIDE = 1 << 26
"""Bytes of a configuration beside the weights."""

__all__ = ["INDEX", "Checkpoint", "Entry", "numbers", "open_checkpoint", "pieces"]

PIECE = 8 << 20
"""Bytes read at a time."""


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
    """`entries` by name, `nbytes` the size of all files.

    `identity` is a digest of all headers, of every file's inode, size and time of change, and of
    the configuration beside them: another checkpoint, or this one changed, has another.
    """

    path: str
    entries: Mapping[str, Entry]
    identity: str
    nbytes: int


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a folder, its index, one safetensors file, or a model's name in the
    local Hugging Face cache.

    Headers only are read. Raises ValueError, one sentence, for what is none, or not whole.
    """
    found = find_files(path)
    if found.missing:
        raise ValueError(f"{found.missing[0]} is missing: the index names it")
    if not found.files:
        raise ValueError(f"{path} holds no safetensors file{found.instead}")
    if found.unindexed:
        raise ValueError(f"{path} holds {len(found.files)} safetensors files and no {INDEX}")
    sha = hashlib.sha256()
    entries: dict[str, Entry] = {}
    total = 0
    for file in found.files:
        header = read_header(file)
        about = os.stat(file)
        sha.update(hashlib.sha256(header.raw).digest())
        sha.update(f"{file.name}|{about.st_ino}|{header.size}|{about.st_mtime_ns}\n".encode())
        total += header.size
        for entry in _entries(header):
            if entry.name in entries:
                raise ValueError(f"{file}: the tensor {entry.name!r} is in another file, too")
            entries[entry.name] = entry
    for name, shard in found.listed().items():
        if name not in entries or Path(entries[name].file).name != shard:
            raise ValueError(f"{path}: the index has {name!r} in {shard}, where it is not")
    for name in ("config.json", "hf_quant_config.json"):
        beside = found.beside(name)
        if beside is not None:
            sha.update(f"{name}|{os.stat(beside).st_mtime_ns}|".encode() + _file_digest(beside))
    return Checkpoint(os.path.realpath(found.path), entries, sha.hexdigest(), total)


def _file_digest(file: Path) -> bytes:
    try:
        return hashlib.sha256(files.whole(file, _MOST_BESIDE, links=True)).digest()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def pieces(
    entry: Entry, start: int = 0, stop: int | None = None, fd: int | None = None
) -> Iterator[bytes]:
    """The bytes `start` to `stop` of a tensor, `PIECE` at most at a time; `fd` is its file, where
    that is open already. Raises ValueError where the file ends before them."""
    at, end = start, entry.nbytes if stop is None else stop
    with ExitStack() as stack:
        if fd is None:
            fd = stack.enter_context(files.opened(entry.file)).fileno()
        while at < end:
            piece = os.pread(fd, min(PIECE, end - at), entry.start + at)
            if not piece:
                raise ValueError(f"{entry.file} ends inside {entry.name!r}: it has changed")
            yield piece
            at += len(piece)


def numbers(entry: Entry, fd: int | None = None) -> Iterator[float]:
    """The elements of a tensor of F64, F32, F16 or BF16; `fd` is its file, where that is open.

    Raises ValueError for another dtype.
    """
    code = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}.get(entry.dtype)
    if code is None:
        raise ValueError(f"{entry.name!r} is {entry.dtype}, which is no floating-point number")
    size = struct.calcsize(code)
    rest = b""
    for piece in pieces(entry, fd=fd):
        piece = rest + piece
        whole = len(piece) - len(piece) % size
        for (value,) in struct.iter_unpack(f"<{code}", piece[:whole]):
            # bf16 is the upper half of a float32.
            yield struct.unpack("<f", struct.pack("<I", value << 16))[0] if code == "H" else value
        rest = piece[whole:]


def _entries(header: FileHeader) -> Iterator[Entry]:
    for name, about in header.tensors.items():
        start, stop = about.data_offsets
        if not about.sound or header.begin + stop > header.size:
            raise ValueError(f"{header.file}: {name[:80]!r} is not where its header says")
        at = header.begin + start
        yield Entry(name, about.dtype, about.shape, str(header.file), at, stop - start)
