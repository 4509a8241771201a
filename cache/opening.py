"""Opening ledger.db: first look, then trust, then write.

It is its owner's alone to read, too: who can read an SQLite database can hold its locks (shared
ones, on the file and on its WAL index), and so keep every writer from it.

Those locks are of the kind that a process loses with the first descriptor of the file that it
closes, whoever in it opened that (fcntl(2)). Without them the next process that closes the ledger
takes itself for the last and removes the log, and what the first goes on to write is lost with it.
So a ledger that this process has open is not looked at again but by SQLite.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from weakref import WeakKeyDictionary

from . import schema, sqlitefile, state, writeahead
from .errors import Corrupt, ReadOnly, Unusable

TIMEOUT = 60.0
"""Seconds a writer waits for another before `Busy`."""


class LedgerConnection(sqlite3.Connection):
    """A connection to a ledger, known to this process as long as it is open."""

    def close(self) -> None:
        super().close()
        with _opening:
            _open.pop(self, None)


_open: WeakKeyDictionary[LedgerConnection, tuple[int, int]] = WeakKeyDictionary()
"""The device and inode of each ledger that this process has open."""
_opening = threading.RLock()
"""Held while a ledger is looked at, until its connection is known, and while one is forgotten."""


def _forget_connections() -> None:
    # A child has none of its parent's locks, and a thread that held ours does not exist in it.
    global _opening
    _opening = threading.RLock()
    _open.clear()


os.register_at_fork(after_in_child=_forget_connections)


def to_write(path: str) -> sqlite3.Connection:
    """A connection to the ledger at `path`, made or brought up to date if need be.

    Raises a StateError, having changed nothing, for a file that is not to be touched; sqlite3's
    and the operating system's own errors pass through.
    """
    with _opening:
        return _to_write(path)


def to_read(path: str) -> sqlite3.Connection:
    """A connection that cannot write, also on a disk that cannot be written. Raises as `to_write`
    does."""
    with _opening:
        return _to_read(path)


def _to_write(path: str) -> sqlite3.Connection:
    place = os.path.dirname(path)
    os.makedirs(place, 0o755, exist_ok=True)
    if not os.access(place, os.W_OK | os.X_OK):
        raise ReadOnly(place, "the state directory cannot be written")
    if not os.path.exists(path):
        with state.exclusive(state.lock_file(place, "ledger"), "a new ledger", wait=TIMEOUT):
            if not os.path.exists(path):
                _create(path)
    _inspect(path)
    _make_owners_alone(path)
    conn = _connect(path, "mode=rw")
    try:
        conn.execute("PRAGMA foreign_keys = ON")
        if conn.execute("PRAGMA user_version").fetchone()[0] < schema.VERSION:
            schema.upgrade(conn, path)
        _use_wal(conn, path)
        conn.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        conn.close()
        raise
    return conn


def _to_read(path: str) -> sqlite3.Connection:
    _inspect(path)
    if os.access(os.path.dirname(path), os.W_OK | os.X_OK):
        # An ordinary connection is the one that sees other writers and cleans up after itself.
        conn = _connect(path, "mode=rw")
    elif os.path.exists(path + "-wal"):
        conn = _connect(path, "mode=ro")
    else:
        conn = _connect(path, "mode=ro&immutable=1")
    conn.execute("PRAGMA query_only = ON")
    return conn


def _inspect(path: str) -> None:
    identity = _identity(path)
    if identity is not None and identity in _open.values():
        return  # it was looked at when it was opened
    sqlitefile.inspect(path, schema.APPLICATION_ID, schema.VERSION, "ledger")
    _set_lost_log_aside(path)
    sqlitefile.verify(path, schema.VERSION, "ledger")


_LOST = "-wal.damaged-"
"""Between the ledger's name and the time, in the names of logs that were set aside."""


def lost_logs(path: str) -> list[str]:
    """A sentence for each log of the ledger at `path` that was found damaged."""
    folder, name = os.path.split(path)
    try:
        names = sorted(each for each in os.listdir(folder) if each.startswith(name + _LOST))
    except OSError:
        return []
    return [
        f"what was written last before {each.removeprefix(name + _LOST)} is lost, for the log was "
        f"damaged; remove {each} to have it said no more"
        for each in names
    ]


def _set_lost_log_aside(path: str) -> None:
    """Give a log that has lost what was in it another name besides, before SQLite takes up what is
    left of it and removes it: so that it is not lost without a word. Raises Corrupt where that
    cannot be, and OSError."""
    if not writeahead.has_lost(path):
        return
    aside = path + _LOST + time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    try:
        os.link(f"{path}-wal", aside)
    except FileExistsError:
        return  # by another process, just now
    except FileNotFoundError:
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        why = "what was written last to the ledger is lost, for its log is damaged"
        raise Corrupt(path, f"{why}; open it where it can be written") from error


def _create(path: str) -> None:
    """Make an empty ledger aside and rename it into place: nobody ever sees half of one."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.new")
    # A log without its database is nothing, and would be replayed into the new one.
    _remove_with_logs(path)
    _remove_with_logs(temporary)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        conn = _connect(temporary, "mode=rw")
        try:
            schema.upgrade(conn, path)
            _use_wal(conn, path)
        finally:
            conn.close()
        os.rename(temporary, path)
    finally:
        _remove_with_logs(temporary)


def _make_owners_alone(path: str) -> None:
    """Take from others what an earlier fp4tune let them read; SQLite gives its log the mode of the
    database."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        try:
            about = os.stat(path + suffix)
            if about.st_mode & 0o077:
                os.chmod(path + suffix, 0o600)
        except (FileNotFoundError, PermissionError):
            continue


def _remove_with_logs(path: str) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)


def _connect(path: str, mode: str) -> sqlite3.Connection:
    conn = sqlite3.connect(
        sqlitefile.uri(path, mode),
        uri=True,
        timeout=TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
        factory=LedgerConnection,
    )
    identity = _identity(path)
    if identity is not None:
        _open[conn] = identity
    return conn


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _use_wal(conn: sqlite3.Connection, path: str) -> None:
    """Switch to WAL. SQLite does not wait for a lock here by itself, so this does."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            mode = conn.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    if mode != "wal":
        raise Unusable(path, "this file system cannot hold the ledger: it must be a local one")
