"""Look at an SQLite file before trusting it, without changing a byte of it or beside it.

Opening a database can itself write (recovery, checkpoint on close, a WAL index), so the header is
read as bytes first: layout in "The Database Header", https://www.sqlite.org/fileformat2.html#the_database_header.
Standard library only.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import struct

from ..machine import files
from .errors import Corrupt, Foreign, Missing, NewerSchema, Unpublished, Unusable, translate

MAGIC = b"SQLite format 3\0"
_BESIDE = ("-wal", "-shm", "-journal")


def inspect(
    path: str, application_id: int, version: int, what: str, most: int | None = None
) -> None:
    """Raise what is wrong with the file at `path`; return if its header is ours and whole.

    Missing, Foreign (no SQLite file, or another program's), NewerSchema, or Corrupt (a pipe, a
    device or the like in its place or in that of its log, empty, of more than `most` bytes, or
    shorter than its own header says). Never waits for whoever may never write to a pipe.
    """
    try:
        with files.opened(path) as file:
            head = file.read(100)
            size = os.fstat(file.fileno()).st_size
    except files.Irregular as error:
        raise Corrupt(path, f"this cannot be the {what}: {error}") from error
    except PermissionError as error:
        raise Unusable(
            path, f"this user may not read the {what}; its owner and root may"
        ) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            import shlex

            kind = Missing if what == "ledger" else Unpublished
            how = f"run fp4tune probe --state {shlex.quote(os.path.dirname(path) or '.')}"
            raise kind(path, f"there is no {what} here; {how}") from error
        raise translate(error, path) from error
    for suffix in _BESIDE:
        if _is_irregular(path + suffix):
            raise Corrupt(path, f"what lies beside the {what} as {suffix} is no regular file")
    if not head:
        raise Corrupt(path, f"the {what} is empty")
    if most is not None and size > most:
        raise Corrupt(path, f"the {what} has {size} bytes, more than the {most} it may have")
    if not MAGIC.startswith(head[:16]):
        raise Foreign(path, f"this is not an fp4tune {what}, nor an SQLite database at all")
    if len(head) < 100:
        raise Corrupt(path, f"the {what} is cut off inside its header")
    found = struct.unpack_from(">I", head, 68)[0]
    if found != application_id:
        raise Foreign(path, f"this SQLite database is not an fp4tune {what}")
    check_version(path, struct.unpack_from(">I", head, 60)[0], version, what)
    page = struct.unpack_from(">H", head, 16)[0]
    page = 65536 if page == 1 else page
    pages = struct.unpack_from(">I", head, 28)[0]
    # A checkpoint that was killed may have written page 1 first; the WAL still has the rest.
    if size < page * pages and not pending_wal(path):
        raise Corrupt(path, f"the {what} is truncated: {size} of {page * pages} bytes are there")


def _is_irregular(path: str) -> bool:
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def check_version(path: str, found: int, version: int, what: str) -> None:
    """Raise NewerSchema if the file's schema is newer than ours."""
    if found > version:
        raise NewerSchema(
            path,
            f"a newer fp4tune wrote this {what} (schema {found}; this one knows up to {version})",
        )


def pending_wal(path: str) -> bool:
    """Whether a write-ahead log with something in it lies beside the file."""
    try:
        return os.stat(path + "-wal").st_size > 0
    except OSError:
        return False


def uri(path: str, parameters: str) -> str:
    """The ``file:`` URI of `path` with `parameters`; by hand, since urllib is slow to import."""
    plain = "/" + os.path.abspath(path).lstrip("/")  # two slashes would begin a host's name
    for char, code in (("%", "%25"), ("?", "%3f"), ("#", "%23")):
        plain = plain.replace(char, code)
    return f"file:{plain}?{parameters}"


def plain_only(conn: sqlite3.Connection, path: str) -> None:
    """Raise Corrupt where the database has more than tables and indices of plain columns: what is
    computed as it is read (views, generated columns, virtual tables) may take for ever."""
    for kind, name, sql in conn.execute("SELECT type, name, sql FROM sqlite_master"):
        text = str(sql or "").upper()
        odd = kind == "table" and ("GENERATED" in text or " AS (" in text or "VIRTUAL" in text)
        if kind not in ("table", "index") or odd:
            raise Corrupt(path, f"it holds {str(name)[:40]!r}, which is computed as it is read")


def verify(path: str, version: int, what: str) -> None:
    """Read the whole database once and raise Corrupt or NewerSchema; writes nothing.

    With a log beside it, it is read through that log; alone, as immutable, so that no log and no
    index are made.
    """
    alone = not os.path.exists(path + "-wal")
    try:
        _verify(path, version, what, "mode=ro&immutable=1" if alone else "mode=ro")
    except Corrupt:
        if not (alone and os.path.exists(path + "-wal")):
            raise
        _verify(path, version, what, "mode=ro")  # a writer came meanwhile: through its log, then


def legible(data: bytes) -> str:
    """Text as a damaged file may hold it: what is no UTF-8 becomes U+FFFD."""
    return data.decode("utf-8", "replace")


def _verify(path: str, version: int, what: str, mode: str) -> None:
    try:
        conn = sqlite3.connect(uri(path, mode), uri=True, timeout=60)
        conn.text_factory = legible
        try:
            check_version(path, conn.execute("PRAGMA user_version").fetchone()[0], version, what)
            result = str(conn.execute("PRAGMA quick_check(1)").fetchone()[0])
        finally:
            conn.close()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise translate(error, path) from error
    if result != "ok":
        raise Corrupt(path, f"the {what} is damaged: {result.splitlines()[0]}")
