"""choices.db: its tables, its digest, and loading it. Standard library only.

The file is written once and never changed, so a reader may open it as immutable; the digest tells
a whole file from anything else. It covers every row, in a spelling that does not depend on the
order or the layout SQLite gave them.

Beside the tables, which are for people and their SQL, the same rows lie in the table ``page``: one
JSON text per layer, under one digest (meta ``page_digest``). `load_pages` reads those alone and
leaves each shut until its layer is asked for, which is what makes opening quick. `json` and
`hashlib` are imported where they are used: they cost more than all the rest.
"""

from __future__ import annotations

import sqlite3

from . import sqlitefile
from .errors import Corrupt, StateError, translate

try:
    from _blake2 import blake2b  # what hashlib.blake2b is, without loading OpenSSL for it
except ImportError:
    from hashlib import blake2b

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

APPLICATION_ID = 0x46503443
"""``FP4C``."""
VERSION = 1
MOST = 1 << 30
"""Bytes of a choices.db that is read at all; one of 10,000 layers has 200 MB."""

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
    "default_backend TEXT, bounds TEXT NOT NULL DEFAULT '{}', "
    f"PRIMARY KEY ({_KEY}, m_lo))",
    f"CREATE TABLE candidate ({_SCOPE}, {_SHAPE}, {_RANGE}, {_TAKEN}, verdict TEXT NOT NULL, "
    "rank INTEGER, median_us REAL, lo_us REAL, hi_us REAL, launches INTEGER NOT NULL, "
    "problems INTEGER NOT NULL, "
    "width INTEGER, conditions TEXT NOT NULL, reasons TEXT NOT NULL, fingerprint TEXT, "
    "bounds TEXT NOT NULL DEFAULT '{}', "
    f"PRIMARY KEY ({_KEY}, m_lo, backend, tactic))",
    f"CREATE TABLE layer ({_SCOPE}, {_SHAPE}, n INTEGER NOT NULL, k INTEGER NOT NULL, "
    f"layout TEXT NOT NULL, expected_us REAL, PRIMARY KEY ({_KEY}))",
    "CREATE TABLE page (name TEXT PRIMARY KEY, body TEXT NOT NULL)",
)

TABLES = ("meta", "environment", "stamp", "choice", "candidate", "layer")

STRUCTURED = {"facts", "conditions", "reasons", "bounds"}
"""The columns that are JSON."""

LAYER_KEY = tuple(_KEY.split(", "))
"""What names a page: whose choice it is, and the layer."""
PAGE_DIGEST = "page_digest"
ENVIRONMENT = "environment"
"""The page that holds that table; it belongs to no layer."""


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
    import hashlib
    import json

    sha = hashlib.sha256()
    for table in TABLES:
        rows = (r for r in tables[table] if table != "meta" or r["key"] != "digest")
        lines = sorted(
            json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False) for row in rows
        )
        for line in (table, *lines):
            sha.update(line.encode() + b"\n")
    return sha.hexdigest()


class Pages:
    """One generation as a reader loads it: `names` are the layers that have a page.

    `stamps` are rows (fingerprint, path, inode, size, mtime_ns).
    """

    __slots__ = ("_bodies", "_environment", "_meta", "generation", "names", "stamps")

    def __init__(
        self,
        meta: Mapping[str, str],
        stamps: list[tuple[Any, ...]],
        bodies: Mapping[str, str],
    ) -> None:
        self.generation = int(meta["generation"])
        self.stamps = stamps
        self._meta = meta
        self._environment = bodies[ENVIRONMENT]
        self._bodies = {
            _layer_of_name(name): body for name, body in bodies.items() if name != ENVIRONMENT
        }
        self.names = list(self._bodies)

    @property
    def meta(self) -> dict[str, Any]:
        """What the publication says of itself."""
        import json

        return {key: json.loads(value) for key, value in self._meta.items()}

    def layer(self, name: tuple[Any, ...]) -> dict[str, list[dict[str, Any]]] | None:
        """Tables ``choice``, ``candidate`` and ``layer`` of one layer; None where it has none."""
        body = self._bodies.get(name)
        if body is None:
            return None
        import json

        page: dict[str, list[dict[str, Any]]] = json.loads(body)
        return page

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All rows of one table, decoded."""
        if table == "meta":
            return [{"key": key, "value": value} for key, value in self.meta.items()]
        if table == "stamp":
            names = ("fingerprint", "path", "inode", "size", "mtime_ns")
            return [dict(zip(names, row, strict=True)) for row in self.stamps]
        if table == ENVIRONMENT:
            import json

            rows: list[dict[str, Any]] = json.loads(self._environment)
            return rows
        return [row for name in self.names for row in (self.layer(name) or {}).get(table, ())]


def pages(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """The rows of `tables` (JSON still as text) as pages, name to body, in a fixed order."""
    layers: dict[str, dict[str, list[Any]]] = {}
    for table in ("choice", "candidate", "layer"):
        for row in tables[table]:
            name = _name_of_layer([row[column] for column in LAYER_KEY])
            page = layers.setdefault(name, {"choice": [], "candidate": [], "layer": []})
            page[table].append(_decoded_row(row))
    bodies = {name: _compact(layers[name]) for name in sorted(layers)}
    bodies[ENVIRONMENT] = _compact([_decoded_row(row) for row in tables[ENVIRONMENT]])
    return bodies


def pages_digest(
    meta: Mapping[str, str], stamps: Iterable[tuple[Any, ...]], bodies: Mapping[str, str]
) -> str:
    """BLAKE2b over what `load_pages` reads, the digests themselves left out."""
    parts = [
        f"{key}\t{value}"
        for key, value in sorted(meta.items())
        if key not in ("digest", PAGE_DIGEST)
    ]
    parts += [repr(row) for row in sorted(stamps)]
    parts += [f"{name}\t{bodies[name]}" for name in sorted(bodies)]
    return blake2b("\n".join(parts).encode(), digest_size=32).hexdigest()


def _name_of_layer(key: Sequence[Any]) -> str:
    name = "\t".join(map(str, key))
    if _layer_of_name(name) != tuple(key):
        raise ValueError(f"{key!r} cannot name a layer: it has tabs, or numbers that are none")
    return name


def _layer_of_name(name: str) -> tuple[Any, ...]:
    parts = name.split("\t")
    return (*parts[:6], *map(int, parts[6:]))


def _compact(value: Any) -> str:
    import json

    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _decoded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    import json

    return {key: json.loads(value) if key in STRUCTURED else value for key, value in row.items()}


def load_pages(path: str) -> Pages:
    """Read what a reader needs of choices.db, in one to two milliseconds; keeps no descriptor.

    Raises as `load` does. A file of an earlier fp4tune, which has no pages, is read whole.
    """
    sqlitefile.inspect(path, APPLICATION_ID, VERSION, "choices database", MOST)
    try:
        conn = sqlite3.connect(sqlitefile.uri(path, "mode=ro&immutable=1"), uri=True)
        try:
            sqlitefile.plain_only(conn, path)
            meta = dict(conn.execute("SELECT key, value FROM meta"))
            own = meta.get(PAGE_DIGEST)
            if own is None:
                return _made_from(load(path))
            stamps = conn.execute(
                "SELECT fingerprint, path, inode, size, mtime_ns FROM stamp"
            ).fetchall()
            bodies = dict(conn.execute("SELECT name, body FROM page"))
        finally:
            conn.close()
        if own != f'"{pages_digest(meta, stamps, bodies)}"':
            raise Corrupt(path, "the choices database does not match its own digest")
        return Pages(meta, stamps, bodies)
    except Exception as error:
        raise _fault_of_file(error, path) from error


def _made_from(loaded: Snapshot) -> Pages:
    plain = {
        table: [{k: _compact(v) if k in STRUCTURED else v for k, v in row.items()} for row in rows]
        for table, rows in loaded.tables.items()
    }
    stamps = [tuple(row.values()) for row in loaded.tables["stamp"]]
    meta = {key: _compact(value) for key, value in loaded.meta.items()}
    return Pages(meta, stamps, pages(plain))


def load(path: str) -> Snapshot:
    """Read a whole choices.db and keep no descriptor.

    Raises Missing, Foreign, NewerSchema or Corrupt; a file that loads is whole, to the last row.
    """
    import json

    sqlitefile.inspect(path, APPLICATION_ID, VERSION, "choices database", MOST)
    try:
        conn = sqlite3.connect(sqlitefile.uri(path, "mode=ro&immutable=1"), uri=True)
        try:
            sqlitefile.plain_only(conn, path)
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
    except Exception as error:
        raise _fault_of_file(error, path) from error


def _fault_of_file(error: Exception, path: str) -> Exception:
    """What `error` means for the file at `path`; itself where it is no fault of the file."""
    if isinstance(error, StateError):
        return error
    if isinstance(error, sqlite3.DatabaseError):
        # The header was ours, so whatever SQLite stumbles over in the body is damage.
        if type(error) is sqlite3.OperationalError and "no such" not in str(error):
            return translate(error, path)
        return Corrupt(path, f"the choices database is damaged: {error}")
    if isinstance(error, (KeyError, ValueError, TypeError)):
        return Corrupt(path, "the choices database holds what fp4tune never writes")
    return error
