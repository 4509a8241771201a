"""choices.db: its tables, its digest, and loading it. Standard library only.

The file is written once and never changed, so a reader may open it as immutable; the digest tells
a whole file from anything else. It covers every row, in a spelling that does not depend on the
order or the layout SQLite gave them.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3

from . import sqlitefile
from .errors import Corrupt, translate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

APPLICATION_ID = 0x46503443
"""``FP4C``."""
VERSION = 1

_SCOPE = "arch TEXT NOT NULL, gpu TEXT NOT NULL, profile TEXT NOT NULL"
_SHAPE = """format TEXT NOT NULL, activation TEXT NOT NULL, out_dtype TEXT NOT NULL,
    groups INTEGER NOT NULL"""
_RANGE = "m_lo INTEGER NOT NULL, m_hi INTEGER NOT NULL, n INTEGER NOT NULL, k INTEGER NOT NULL"
_TAKEN = "backend TEXT NOT NULL, tactic TEXT NOT NULL, layout TEXT NOT NULL"
_KEY = "arch, gpu, profile, format, activation, out_dtype, groups, n, k"

SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE environment (fingerprint TEXT PRIMARY KEY, backend TEXT NOT NULL, "
    "arch TEXT NOT NULL, facts TEXT NOT NULL)",
    "CREATE TABLE stamp (fingerprint TEXT NOT NULL, path TEXT NOT NULL, inode INTEGER NOT NULL, "
    "size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, PRIMARY KEY (fingerprint, path))",
    f"CREATE TABLE choice ({_SCOPE}, {_SHAPE}, {_RANGE}, {_TAKEN}, status TEXT NOT NULL, "
    "conditions TEXT NOT NULL, median_us REAL, launches INTEGER NOT NULL, "
    "problems INTEGER NOT NULL, fingerprint TEXT, "
    f"default_backend TEXT, PRIMARY KEY ({_KEY}, m_lo))",
    f"CREATE TABLE candidate ({_SCOPE}, {_SHAPE}, {_RANGE}, {_TAKEN}, verdict TEXT NOT NULL, "
    "rank INTEGER, median_us REAL, lo_us REAL, hi_us REAL, launches INTEGER NOT NULL, "
    "problems INTEGER NOT NULL, "
    "width INTEGER, conditions TEXT NOT NULL, reasons TEXT NOT NULL, fingerprint TEXT, "
    f"PRIMARY KEY ({_KEY}, m_lo, backend, tactic))",
    f"CREATE TABLE layer ({_SCOPE}, {_SHAPE}, n INTEGER NOT NULL, k INTEGER NOT NULL, "
    f"layout TEXT NOT NULL, expected_us REAL, PRIMARY KEY ({_KEY}))",
)

TABLES = ("meta", "environment", "stamp", "choice", "candidate", "layer")

STRUCTURED = {"facts", "conditions", "reasons"}
"""The columns that are JSON."""


class Snapshot:
    """One generation: `tables` maps a table's name to its rows, dictionaries with JSON decoded."""

    __slots__ = ("digest", "generation", "meta", "tables")

    def __init__(
        self, generation: int, digest: str, meta: dict[str, Any], tables: dict[str, list[dict]]
    ) -> None:
        self.generation = generation
        self.digest = digest
        self.meta = meta
        self.tables = tables


def read_tables(conn: sqlite3.Connection) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables on `conn`."""
    out = {}
    for table in TABLES:
        cursor = conn.execute(f"SELECT * FROM {table} ORDER BY rowid")
        columns = [c[0] for c in cursor.description]
        out[table] = [dict(zip(columns, row, strict=True)) for row in cursor]
    return out


def digest(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """SHA-256 over all rows, each as canonical JSON, sorted; the digest's own row left out.

    Raises ValueError or TypeError for a value no row of ours can hold (NaN, bytes).
    """
    sha = hashlib.sha256()
    for table in TABLES:
        rows = (r for r in tables[table] if table != "meta" or r["key"] != "digest")
        lines = sorted(
            json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False) for row in rows
        )
        for line in (table, *lines):
            sha.update(line.encode() + b"\n")
    return sha.hexdigest()


def load(path: str) -> Snapshot:
    """Read a whole choices.db and keep no descriptor.

    Raises Missing, Foreign, NewerSchema or Corrupt; a file that loads is whole, to the last row.
    """
    sqlitefile.inspect(path, APPLICATION_ID, VERSION, "choices database")
    try:
        conn = sqlite3.connect(sqlitefile.uri(path, "mode=ro&immutable=1"), uri=True)
        try:
            tables = read_tables(conn)
        finally:
            conn.close()
        meta = {row["key"]: json.loads(row["value"]) for row in tables["meta"]}
        if digest(tables) != meta["digest"]:
            raise Corrupt(path, "the choices database does not match its own digest")
        for row in (row for name in TABLES[1:] for row in tables[name]):
            for column in STRUCTURED & row.keys():
                row[column] = json.loads(row[column])
        return Snapshot(int(meta["generation"]), meta["digest"], meta, tables)
    except sqlite3.DatabaseError as error:
        # The header was ours, so whatever SQLite stumbles over in the body is damage.
        found = translate(error, path)
        if type(error) is sqlite3.OperationalError and "no such" not in str(error):
            raise found from error
        raise Corrupt(path, f"the choices database is damaged: {error}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise Corrupt(path, "the choices database holds what fp4tune never writes") from error
