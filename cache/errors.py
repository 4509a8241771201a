"""What can go wrong with the store, each in one sentence.

    StateError
     +-- Missing        no such database yet
     +-- Foreign        the file is not one of fp4tune's
     +-- Corrupt        it is ours, and damaged
     |    +-- Undecodable    a row of it says what no row can
     +-- NewerSchema    a newer fp4tune wrote it
     +-- ReadOnly       it cannot be written here
     +-- Full           the disk is full
     +-- Busy           another process holds it
     +-- Unusable       this installation lacks something (an older sqlite-utils, a network disk)

Standard library only: the engine's reader imports this.
"""

from __future__ import annotations

import errno
import os


class StateError(Exception):
    """The store could not be used. `exit_code` 2 is "could not assess" in every command."""

    exit_code = 2

    def __init__(self, path: object, sentence: str) -> None:
        self.path = os.fspath(path) if hasattr(path, "__fspath__") else str(path)
        self.sentence = sentence
        super().__init__(f"{self.path}: {sentence}")

    def __reduce__(self) -> tuple[type[StateError], tuple[str, str]]:
        return type(self), (self.path, self.sentence)


class Missing(StateError):
    """There is no such database yet."""


class Unpublished(Missing):
    """Nothing is published in the place that was looked at, or in none."""


class Foreign(StateError):
    """The file exists and is not one of fp4tune's."""


class Corrupt(StateError):
    """The file is fp4tune's and cannot be trusted: truncated, damaged, or half of something."""


class Undecodable(Corrupt):
    """A stored row cannot be decoded."""


class NewerSchema(StateError):
    """A newer fp4tune wrote the file."""


class ReadOnly(StateError):
    """The place cannot be written."""


class Full(StateError):
    """The disk is full."""


class Busy(StateError):
    """Another process holds it. `pid` is that process's, where it is known."""

    def __init__(self, path: object, sentence: str, pid: int | None = None) -> None:
        super().__init__(path, sentence)
        self.pid = pid


class Unusable(StateError):
    """What the store needs is not there: a library's version, or a local file system."""


_WRITE_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_DAMAGED = ("malformed", "no such column", "no such table", "Could not decode to UTF-8")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def translate(error: Exception, path: object) -> StateError:
    """The StateError that says what `error`, from sqlite3 or the operating system, means here.

    By the message and not by `sqlite_errorcode`, which Python has from 3.11 on only.
    """
    if isinstance(error, StateError):
        return error
    text = str(error)
    if isinstance(error, UnicodeDecodeError):  # SQLite names what it stumbled over
        return Corrupt(path, "the database is damaged")
    if isinstance(error, OSError):
        if error.errno in _NO_ROOM:
            return _full(path)
        if error.errno in _WRITE_REFUSED:
            return ReadOnly(path, "this place cannot be written")
        if error.errno == errno.ENOENT:
            return Missing(path, "there is no such file")
        return StateError(path, f"the operating system refused: {error.strerror or text}")
    if "disk is full" in text:
        return _full(path)
    if "locked" in text:
        return Busy(path, "another process kept it locked for longer than the time-out")
    if "readonly" in text or "unable to open" in text:
        return ReadOnly(path, "the database cannot be opened for writing here")
    if "not a database" in text:
        return Foreign(path, "this is not an SQLite database")
    if any(word in text for word in _DAMAGED):
        return Corrupt(path, "the database is damaged")
    if "disk I/O error" in text and _no_space_left(path):
        return _full(path)
    return StateError(path, f"SQLite refused: {text}")


def _full(path: object) -> Full:
    return Full(path, "the disk is full: this could not be written, and what was there stays")


def _no_space_left(path: object) -> bool:
    """SQLite reports a WAL index that cannot grow as an I/O error; a full disk is told apart."""
    try:
        room = os.statvfs(os.path.dirname(str(path)) or ".")
    except OSError:
        return False
    return room.f_bavail * room.f_frsize < 1 << 16
