"""The ledger's tables, as sqlite-utils migrations. Add a function; never change an old one."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import codec, seal
from .errors import Unusable

if TYPE_CHECKING:
    from sqlite_utils import Database

APPLICATION_ID = 0x4650344C
"""``FP4L``: how file(1) and we know a ledger from another program's database."""

BUCKET = """
    format TEXT NOT NULL, activation TEXT NOT NULL, out_dtype TEXT NOT NULL,
    groups INTEGER NOT NULL, m_lo INTEGER NOT NULL, m_hi INTEGER NOT NULL,
    n INTEGER NOT NULL, k INTEGER NOT NULL"""

WHAT = (
    """
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL REFERENCES run(id),
    fingerprint TEXT NOT NULL REFERENCES environment(fingerprint),
    backend TEXT NOT NULL, tactic TEXT NOT NULL,"""
    + BUCKET
)

FIRST = (
    """CREATE TABLE environment (
        fingerprint TEXT PRIMARY KEY, backend TEXT NOT NULL, arch TEXT NOT NULL,
        facts TEXT NOT NULL, first_seen REAL NOT NULL)""",
    """CREATE TABLE stamp (
        fingerprint TEXT NOT NULL REFERENCES environment(fingerprint), path TEXT NOT NULL,
        inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        PRIMARY KEY (fingerprint, path))""",
    """CREATE TABLE run (
        id TEXT PRIMARY KEY, started REAL NOT NULL, finished REAL, status TEXT NOT NULL
        CHECK (status IN ('running', 'finished', 'failed', 'interrupted')),
        seed TEXT NOT NULL, level TEXT NOT NULL, profile TEXT NOT NULL,
        device TEXT NOT NULL, argv TEXT NOT NULL, versions TEXT NOT NULL)""",
    f"""CREATE TABLE evidence ({WHAT},
        regime TEXT NOT NULL, data TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN
        ('passed', 'failed', 'not exercised', 'not applicable', 'skipped')),
        launches INTEGER NOT NULL, problems INTEGER NOT NULL, width INTEGER,
        seconds REAL NOT NULL,
        detail TEXT NOT NULL, at REAL NOT NULL)""",
    f"""CREATE TABLE finding ({WHAT},
        problem TEXT NOT NULL, kind TEXT NOT NULL, regime TEXT NOT NULL, data TEXT NOT NULL,
        seed TEXT NOT NULL, launch INTEGER, condition TEXT, detail TEXT NOT NULL,
        at REAL NOT NULL)""",
    f"""CREATE TABLE timing ({WHAT},
        median_us REAL NOT NULL, lo_us REAL NOT NULL, hi_us REAL NOT NULL,
        samples INTEGER NOT NULL, host_us REAL, detail TEXT NOT NULL, at REAL NOT NULL)""",
    f"""CREATE TABLE verdict ({WHAT},
        profile TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN
        ('safe', 'unsafe', 'unsupported', 'inconclusive')),
        conditions TEXT NOT NULL, reasons TEXT NOT NULL, at REAL NOT NULL)""",
    """CREATE TABLE build (
        id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL REFERENCES run(id),
        backend TEXT NOT NULL, seconds REAL NOT NULL, detail TEXT NOT NULL, at REAL NOT NULL)""",
    """CREATE TABLE generation (
        number INTEGER PRIMARY KEY, at REAL NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('writing', 'published', 'abandoned')),
        origin TEXT NOT NULL, digest TEXT, content BLOB)""",
    *(
        f"CREATE INDEX {table}_by_{column} ON {table} ({column})"
        for table in ("evidence", "finding", "timing", "verdict")
        for column in ("run", "fingerprint")
    ),
)


def _create_first(db: Database) -> None:
    for statement in FIRST:
        db.conn.execute(statement)


def _add_bounds(db: Database) -> None:
    db.conn.execute("ALTER TABLE verdict ADD COLUMN bounds TEXT NOT NULL DEFAULT '{}'")


def _add_audits(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT, content TEXT, module TEXT NOT NULL, path TEXT,
        sm INTEGER, verdict TEXT NOT NULL CHECK (verdict IN ('flagged', 'clean', 'unknown')),
        authority TEXT NOT NULL, pdl TEXT NOT NULL, backend TEXT, digest TEXT, remedy TEXT,
        evidence TEXT NOT NULL, at REAL NOT NULL)"""
    )
    db.conn.execute("CREATE INDEX audit_by_content ON audit (content)")


def _add_probed(db: Database) -> None:
    db.conn.execute(
        f"""CREATE TABLE probed (
        id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL REFERENCES run(id), {BUCKET},
        device TEXT NOT NULL, method TEXT NOT NULL, detail TEXT NOT NULL, at REAL NOT NULL)"""
    )
    db.conn.execute("CREATE INDEX probed_by_layer ON probed (n, k)")


SEALED = (
    "environment",
    "run",
    "evidence",
    "finding",
    "timing",
    "verdict",
    "build",
    "audit",
    "probed",
    "generation",
)
"""Tables of earlier schemas whose rows got a seal; those that came later were made with it."""
OF_RUNS = ("evidence", "finding", "timing", "verdict", "build", "probed", "step")
"""Tables whose rows belong to a run, and are counted in its ``contents``."""
OF_ENVIRONMENTS = ("evidence", "finding", "timing", "verdict", "step")
"""Tables whose rows name an environment."""
NUMBERED = (*OF_RUNS, "audit", "forgotten")
"""Tables whose rows SQLite numbers, each after the last there ever was; none is removed."""
OF_NONE = {
    "environment": "fingerprint",
    "audit": "id",
    "generation": "number",
    "forgotten": "id",
}
"""Sealed tables whose rows belong to no run, and what they are in order by."""
SINCE = {"audit": 3, "probed": 4, "step": 6, "forgotten": 7}
"""The schema that brought a table: a ledger that is only read may be older."""


def _add_seals(db: Database) -> None:
    for table in SEALED:
        db.conn.execute(f"ALTER TABLE {table} ADD COLUMN seal TEXT")
    db.conn.execute(
        """CREATE TABLE contents (
        run TEXT PRIMARY KEY REFERENCES run(id), rows INTEGER NOT NULL, sum TEXT NOT NULL,
        seal TEXT)"""
    )
    # What lies here is taken to be what was stored: nothing says otherwise, unless it cannot be.
    sums: dict[str, list[str]] = {}
    for table in SEALED:
        for row in _stored_rows(db.conn, table):
            if not codec.decodes(table, row):
                continue
            mark = seal.of(table, _sealed(db.conn, table, row))
            db.conn.execute(f"UPDATE {table} SET seal = ? WHERE rowid = ?", (mark, row["rowid"]))
            if table in OF_RUNS:
                sums.setdefault(row["run"], []).append(mark)
    for row in _stored_rows(db.conn, "run"):
        seals = sums.get(row["id"], [])
        found = {"run": row["id"], "rows": len(seals), "sum": seal.added(seal.NOTHING, seals)}
        db.conn.execute(
            "INSERT INTO contents (run, rows, sum, seal) VALUES (?, ?, ?, ?)",
            (*found.values(), seal.of("contents", found)),
        )


def _stored_rows(conn: sqlite3.Connection, table: str) -> list[dict[str, Any]]:
    cursor = conn.execute(f"SELECT rowid AS rowid, * FROM {table} NOT INDEXED")
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _sealed(conn: sqlite3.Connection, table: str, row: dict[str, Any]) -> dict[str, Any]:
    """What of a row is sealed: an environment's stamps with it."""
    found = {name: value for name, value in row.items() if name != "rowid"}
    return with_stamps(conn, found) if table == "environment" else found


def with_stamps(conn: sqlite3.Connection, environment: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``environment`` with its rows of ``stamp``, which are under the same seal."""
    found = conn.execute(
        "SELECT path, inode, size, mtime_ns FROM stamp NOT INDEXED WHERE fingerprint = ? "
        "ORDER BY path",
        (environment["fingerprint"],),
    )
    return {**environment, "stamps": [tuple(row) for row in found.fetchall()]}


def _add_steps(db: Database) -> None:
    db.conn.execute(
        f"""CREATE TABLE step (
        id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL REFERENCES run(id),
        fingerprint TEXT NOT NULL REFERENCES environment(fingerprint),
        backend TEXT NOT NULL, {BUCKET}, what TEXT NOT NULL, detail TEXT NOT NULL,
        at REAL NOT NULL, seal TEXT)"""
    )
    db.conn.execute("CREATE INDEX step_by_layer ON step (n, k)")
    db.conn.execute("CREATE INDEX step_by_run ON step (run)")


def _add_forgotten(db: Database) -> None:
    db.conn.execute(
        """CREATE TABLE forgotten (
        id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT, backend TEXT, n INTEGER, k INTEGER,
        finding INTEGER, rows TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL,
        seal TEXT)"""
    )


MIGRATIONS = {
    "first": _create_first,
    "bounds": _add_bounds,
    "audits": _add_audits,
    "probed": _add_probed,
    "seals": _add_seals,
    "steps": _add_steps,
    "forgotten": _add_forgotten,
}
"""By the name that ledgers keep of those that were made to them."""

VERSION = len(MIGRATIONS)
"""Kept in the file as its user_version."""


def upgrade(conn: sqlite3.Connection, path: object) -> None:
    """Bring the ledger open on `conn` to VERSION, in one transaction: all of it or nothing.

    Waits for another process that is doing the same. Raises Unusable where sqlite-utils is older
    than 4 and has no migrations.
    """
    try:
        from sqlite_utils import Database, Migrations
    except ImportError as error:
        raise Unusable(path, "writing the ledger needs sqlite-utils 4.2 or newer") from error
    migrations = Migrations("fp4tune-ledger")
    for name, step in MIGRATIONS.items():
        migrations(name=name)(step)
    conn.execute("BEGIN IMMEDIATE")
    try:
        conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        # Inside our transaction sqlite-utils nests each migration as a savepoint.
        migrations.apply(Database(conn, execute_plugins=False))
        conn.execute(f"PRAGMA user_version = {VERSION}")
        conn.execute("COMMIT")
    except BaseException:
        if conn.in_transaction:
            conn.execute("ROLLBACK")
        raise
