"""Opening ledger.db: first look, then trust, then write.

It is its owner's alone to read, too: who can read an SQLite database can hold its locks (shared
ones, on the file and on its WAL index), and so keep every writer from it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time

from . import schema, sqlitefile, state
from .errors import ReadOnly, Unusable

TIMEOUT = 60.0
"""Seconds a writer waits for another before `Busy`."""


def to_write(path: str) -> sqlite3.Connection:
    """A connection to the ledger at `path`, made or brought up to date if need be.

    Raises a StateError, having changed nothing, for a file that is not to be touched; sqlite3's
    and the operating system's own errors pass through.
    """
    place = os.path.dirname(path)
    os.makedirs(place, exist_ok=True)
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


def to_read(path: str) -> sqlite3.Connection:
    """A connection that cannot write, also on a disk that cannot be written."""
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
    sqlitefile.inspect(path, schema.APPLICATION_ID, schema.VERSION, "ledger")
    sqlitefile.verify(path, schema.VERSION, "ledger")


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
    return sqlite3.connect(
        sqlitefile.uri(path, mode),
        uri=True,
        timeout=TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
    )


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
