"""What is left of a ledger that SQLite cannot read as a whole: the rows that fit their seals."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from typing import Any

from ..machine import files
from . import opening, schema, seal, sqlitefile, state
from .errors import translate
from .sealed import SEALS

_ORDER = (
    "environment", "run", "contents", "evidence", "finding", "timing", "verdict", "build", "probed",
    "step", "audit", "generation", "forgotten",
)  # fmt: skip


def salvage(damaged: str, state_dir: str) -> int:
    """Copy the rows of the ledger at `damaged` that are as they were stored into the one of
    `state_dir`, as they are; how many. Runs that lack rows then are set aside like any other.

    Raises StateError where they cannot be written.
    """
    if any(files.is_special(damaged + suffix) for suffix in ("", "-wal", "-journal")):
        return 0  # a pipe would be waited for
    path = os.path.join(state_dir, state.LEDGER)
    try:
        with (
            contextlib.closing(_reading(damaged)) as old,
            contextlib.closing(opening.to_write(path)) as new,
        ):
            return _copy_whole_rows(old, new)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise translate(error, path) from error


def _reading(path: str) -> sqlite3.Connection:
    how = "mode=ro" if os.path.exists(f"{path}-wal") else "mode=ro&immutable=1"
    conn = sqlite3.connect(sqlitefile.uri(path, how), uri=True)
    conn.text_factory = sqlitefile.legible
    return conn


def _copy_whole_rows(old: sqlite3.Connection, new: sqlite3.Connection) -> int:
    count = 0
    # A failure whose run is lost counts on, so no row is left out for another's sake.
    new.execute("PRAGMA foreign_keys = OFF")
    with _in_one(new):
        for table in _ORDER:
            for row in _rows_from_both_ends(old, table):
                stamps = _stamps(old, row["fingerprint"]) if table == "environment" else []
                sealed = {**row, "stamps": stamps} if table == "environment" else row
                if not seal.fits(table, sealed):
                    continue
                marks = ", ".join("?" * len(row))
                sql = f"INSERT OR IGNORE INTO {table} ({', '.join(row)}) VALUES ({marks})"
                count += new.execute(sql, tuple(row.values())).rowcount
                new.executemany(
                    "INSERT OR IGNORE INTO stamp (fingerprint, path, inode, size, mtime_ns) "
                    "VALUES (?, ?, ?, ?, ?)",
                    [(row["fingerprint"], *stamp) for stamp in stamps],
                )
    return count


@contextlib.contextmanager
def _in_one(conn: sqlite3.Connection) -> Iterator[None]:
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        conn.execute("ROLLBACK")
        raise


def _rows_from_both_ends(conn: sqlite3.Connection, table: str) -> list[dict[str, Any]]:
    """Rows of a table from both its ends, as far as SQLite comes: what lies between is lost."""
    found: dict[int, dict[str, Any]] = {}
    for order in ("ASC", "DESC"):
        try:
            if conn.execute("PRAGMA user_version").fetchone()[0] < SEALS:
                return []
            cursor = conn.execute(
                f"SELECT rowid AS rowid_, * FROM {table} NOT INDEXED ORDER BY rowid {order}"
            )
            names = [column[0] for column in cursor.description]
            for values in cursor:
                row = dict(zip(names, values, strict=True))
                found.setdefault(row.pop("rowid_"), row)
        except (sqlite3.Error, UnicodeDecodeError):
            continue
    return [found[number] for number in sorted(found)]


def _stamps(conn: sqlite3.Connection, fingerprint: str) -> list[tuple[Any, ...]]:
    try:
        return list(schema.with_stamps(conn, {"fingerprint": fingerprint})["stamps"])
    except (sqlite3.Error, UnicodeDecodeError):
        return []
