"""Whether a write-ahead log still holds what its writers put there (sqlite.org/walformat.html).

Where a log is damaged, SQLite takes what comes before the damage and drops the rest without a word:
that is what lets it survive a power cut. The index that lies beside the log, and outlives writers
that are killed, says how much there was. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from ..machine import files

MOST = 64 << 20
"""Bytes of a log that is looked at; SQLite begins it anew after 4 MB, as a rule."""
_HEADER, _FRAME = 32, 24
_INDEX = 48
"""Bytes of the index's header, which is there twice."""
_MAGIC = (0x377F0682, 0x377F0683)
"""Of a log whose sums are over little-endian words, and over big-endian ones."""
_LIVES = 128
"""The byte of the index that every connection holds a lock on."""
_LOCK = "hhqqi"


class WalIndex(NamedTuple):
    """What the index says: how many frames of whole transactions the log with these salts has."""

    frames: int
    salts: bytes


def has_lost(path: str) -> bool:
    """Whether the log of the database at `path` lacks frames that were written there, or has others
    than those. False where a living process has the database open: it has its log in hand, then.

    A log of more than `MOST` bytes is not looked at. Not for a process that has the database open
    itself, whose locks it would drop. Raises OSError.
    """
    before = _index(f"{path}-shm")
    if _lives(f"{path}-shm"):
        return False
    try:
        log = files.whole(f"{path}-wal", MOST)
    except FileNotFoundError:
        log = b""
    except files.Irregular:
        return False
    if before is None:
        lost = bool(log) and _is_broken(log)
    else:
        lost = before.frames > 0 and not _has_all_frames(log, before)
    # Somebody may have opened the database meanwhile, and have begun the log anew.
    return lost and not _lives(f"{path}-shm") and _index(f"{path}-shm") == before


def _has_all_frames(log: bytes, index: WalIndex) -> bool:
    if log[16:24] != index.salts:
        return False
    found = [whole for whole, _ in islice(_frames(log), index.frames)]
    return len(found) == index.frames and all(found)


def _is_broken(log: bytes) -> bool:
    """Whether there is damage that no writer leaves behind that was killed: a head that is none, or
    frames that go on after one that does not fit."""
    found = list(_frames(log))
    if not found:
        return len(log) > _HEADER
    fits = [whole for whole, _ in found]
    first = fits.index(False) if False in fits else len(fits)
    return any(current for _, current in found[first + 1 :])


def _frames(log: bytes) -> Iterator[tuple[bool, bool]]:
    """Of each frame whether it and all before it fit their sums, and whether it has the salts of
    the log, as one of before it was begun anew has not. None where the log's head is damaged."""
    if len(log) < _HEADER:
        return
    magic, _, page = struct.unpack_from(">3I", log)
    if magic not in _MAGIC or not 512 <= page <= 65536:
        return
    swapped = (magic == _MAGIC[1]) != (sys.byteorder == "big")
    total = _summed(log[: _HEADER - 8], (0, 0), swapped)
    whole = total == struct.unpack_from(">2I", log, _HEADER - 8)
    if not whole:
        return
    for at in range(_HEADER, len(log) - _FRAME - page + 1, _FRAME + page):
        current = log[at + 8 : at + 16] == log[16:24]
        if whole:
            total = _summed(log[at : at + 8], total, swapped)
            total = _summed(log[at + _FRAME : at + _FRAME + page], total, swapped)
            whole = current and total == struct.unpack_from(">2I", log, at + 16)
        yield whole, current


def _summed(data: bytes, total: tuple[int, int], swapped: bool) -> tuple[int, int]:
    words = array("I", data)
    if swapped:
        words.byteswap()
    first, second = total
    for number in range(0, len(words), 2):
        first = (first + words[number] + second) & 0xFFFFFFFF
        second = (second + words[number + 1] + first) & 0xFFFFFFFF
    return first, second


def _index(path: str) -> WalIndex | None:
    """What the index at `path` says; None where there is none that is whole."""
    try:
        with files.opened(path, links=False) as file:
            data = file.read(2 * _INDEX)
    except FileNotFoundError:
        return None
    head = data[:_INDEX]
    if len(data) < 2 * _INDEX or head != data[_INDEX:] or not head[12]:
        return None
    if _summed(head[:-8], (0, 0), swapped=False) != struct.unpack_from("=2I", head, _INDEX - 8):
        return None
    return WalIndex(struct.unpack_from("=I", head, 16)[0], head[32:40])


def _lives(path: str) -> bool:
    """Whether another process has the database of this index open."""
    asked = struct.pack(_LOCK, fcntl.F_WRLCK, os.SEEK_SET, _LIVES, 1, 0)
    try:
        fd = files.descriptor(path)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, asked)
    finally:
        os.close(fd)
    return bool(struct.unpack(_LOCK, answer)[0] != fcntl.F_UNLCK)
