"""Tables whose every row is sealed: written with its seal, and read only where that fits.

What a disk changed is not returned: it is counted, by table and run, and `damage` says so. Nothing
of it is decoded, so nothing in it can raise.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import codec, schema, seal, sqlitefile
from .errors import translate

SEALS = 5
"""The first schema whose rows are sealed."""
_CONTENTS = "contents"


class SealedTables:
    """The tables of an open ledger. Safe to share between threads, not across a fork."""

    def __init__(self, path: str, conn: sqlite3.Connection, readonly: bool) -> None:
        self.path = path
        self.conn = conn
        self.conn.row_factory = sqlite3.Row
        # What is no UTF-8 any more has another seal; it must come as far as that.
        self.conn.text_factory = sqlitefile.legible
        self.lock = threading.RLock()
        self._damaged: dict[tuple[str, Any], str | None] = {}
        """By table and id: the run of each row met that is not what was stored."""
        self._runs: dict[str, str] = {}
        """By run: what is wrong with it, empty for nothing."""
        with self.translated():
            self.version = int(conn.execute("PRAGMA user_version").fetchone()[0])
            self._through = ""
            if not self._indexes_are_whole():
                # The rows are there; what leads to them is not to be trusted.
                self._through = " NOT INDEXED"
                if not readonly:
                    conn.execute("REINDEX")
                    self._through = ""

    def has(self, table: str) -> bool:
        """Whether the ledger, which may be of an earlier schema, has that table."""
        return self.version >= schema.SINCE.get(table, 0)

    def _indexes_are_whole(self) -> bool:
        """Whether every index leads to every row, which opening does not look at."""
        return bool(self.conn.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok")

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """SQLite's errors as StateErrors; a row it refuses as ValueError."""
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise ValueError(f"the ledger refused a row: {error}") from error
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise translate(error, self.path) from error

    @contextlib.contextmanager
    def transaction(self, writes: bool = True) -> Iterator[None]:
        """One transaction, taken for writing from the start so that it cannot fail half-way for
        another writer's sake; inside another, part of that one. Without `writes` one that sees the
        tables as they were when it began."""
        with self.lock, self.translated():
            if self.conn.in_transaction:
                yield
                return
            self.conn.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            try:
                yield
                self.conn.execute("COMMIT")
            except BaseException:
                if self.conn.in_transaction:
                    self.conn.execute("ROLLBACK")
                raise

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows as they lie there, sealed or not."""
        with self.lock, self.translated():
            return [dict(row) for row in self.conn.execute(sql, tuple(values))]

    # -- writing

    def insert(self, table: str, row: Mapping[str, Any]) -> int:
        """Add a row, sealed and counted as its run's; its rowid."""
        marks = ", ".join("?" * len(row))
        with self.transaction():
            cursor = self.conn.execute(
                f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values())
            )
            number = cursor.lastrowid or 0
            mark = self._seal(table, number)
            if table in schema.OF_RUNS:
                self._count(str(row["run"]), mark)
        return number

    def update(self, table: str, key: str, value: object, **changes: Any) -> None:
        """Change the row whose `key` is `value`; one that is damaged stays so."""
        assignments = ", ".join(f"{name} = ?" for name in changes)
        with self.transaction():
            where = f"FROM {table} WHERE {key} = ?"
            for row in self.query(f"SELECT rowid AS rowid_, * {where}", [value]):
                number = row.pop("rowid_")
                whole = seal.fits(table, self._whole(table, row))
                self.conn.execute(
                    f"UPDATE {table} SET {assignments} WHERE rowid = ?", (*changes.values(), number)
                )
                if whole:
                    self._seal(table, number)

    def reseal(self, table: str, key: str, value: object) -> None:
        """Seal the row whose `key` is `value` as it lies there now."""
        with self.transaction():
            for row in self.query(f"SELECT rowid AS rowid_ FROM {table} WHERE {key} = ?", [value]):
                self._seal(table, row["rowid_"])

    def begin(self, run: str) -> None:
        """Start the count of a run's rows."""
        self.insert(_CONTENTS, {"run": run, "rows": 0, "sum": seal.NOTHING})

    def _seal(self, table: str, rowid: int) -> str:
        (row,) = self.query(f"SELECT * FROM {table} WHERE rowid = ?", [rowid])
        mark = seal.of(table, self._whole(table, row))
        self.conn.execute(f"UPDATE {table} SET {seal.SEAL} = ? WHERE rowid = ?", (mark, rowid))
        return mark

    def _count(self, run: str, mark: str) -> None:
        self._runs.pop(run, None)
        for row in self.query(f"SELECT * FROM {_CONTENTS} WHERE run = ?", [run]):
            if seal.fits(_CONTENTS, row):
                total = seal.added(row["sum"], [mark])
                self.update(_CONTENTS, "run", run, rows=row["rows"] + 1, sum=total)

    # -- reading

    def select(
        self, table: str, where: str = "", values: Sequence[Any] = (), order: str = "id"
    ) -> list[dict[str, Any]]:
        """The rows of `table` that are what was stored, without their seals."""
        with self.transaction(writes=False):
            source = f"{table}{self._through}{where}"
            rows = self.query(f"SELECT * FROM {source} ORDER BY {order}", values)
            return [row for row in rows if self._intact(table, row)]

    def _intact(self, table: str, row: dict[str, Any]) -> bool:
        if self.version < SEALS:
            found = codec.decodes(table, row)
        else:
            found = seal.fits(table, self._whole(table, row))
            row.pop(seal.SEAL, None)
        if not found:
            key = row.get("id", row.get("fingerprint", row.get("number")))
            self._damaged[table, key] = row.get("run") if table != "run" else row["id"]
        return found

    def _whole(self, table: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return schema.with_stamps(self.conn, row) if table == "environment" else row

    # -- what is damaged

    def damaged(self, run: str) -> str:
        """What of a run is not as it was stored, in a few words; empty where all of it is.

        Looked at once: what this process adds meanwhile is counted, and what a disk does, later.
        """
        if self.version < SEALS:
            return ""
        with self.transaction(writes=False):
            if run not in self._runs:
                self._runs[run] = self._wrong_with(run)
            return self._runs[run]

    def _wrong_with(self, run: str) -> str:
        if not self.select("run", " WHERE id = ?", [run]):
            return "what it was is not as it was stored"
        seals: list[str] = []
        bad: Counter[str] = Counter()
        for table in filter(self.has, schema.OF_RUNS):
            for row in self._of(table, run):
                mark = row.get(seal.SEAL)
                if self._intact(table, row):
                    seals.append(str(mark))
                else:
                    bad[table] += 1
        if bad:
            said = " and ".join(f"{count} of {table}" for table, count in bad.items())
            return f"rows are not as they were stored: {said}"
        counts = self._of(_CONTENTS, run)
        if not counts or not seal.fits(_CONTENTS, counts[0]):
            return "how many rows it had is not as it was stored"
        if counts[0]["rows"] != len(seals):
            return f"it had {counts[0]['rows']} rows, and {len(seals)} are there"
        if counts[0]["sum"] != seal.added(seal.NOTHING, seals):
            return "its rows are not those that were stored"
        return ""

    def _of(self, table: str, run: str) -> list[dict[str, Any]]:
        return self.query(f"SELECT * FROM {table}{self._through} WHERE run = ?", [run])

    def damage(self) -> tuple[dict[str, str], list[str]]:
        """Look at every row: what is wrong with which run, and what of rows that belong to none."""
        if self.version < SEALS:
            return {}, []
        with self.transaction(writes=False):
            self._runs.clear()
            ids = {row["id"] for row in self.query("SELECT id FROM run NOT INDEXED")}
            for table in filter(self.has, (*schema.OF_RUNS, _CONTENTS)):
                found = self.query(f"SELECT DISTINCT run FROM {table} NOT INDEXED")
                ids |= {row["run"] for row in found}
            runs = {run: why for run in sorted(map(str, ids)) if (why := self.damaged(run))}
            said = self._gone()
            for table, order in schema.OF_NONE.items():
                if not self.has(table):
                    continue
                rows = self.query(f"SELECT * FROM {table}")
                if bad := len(rows) - len(self.select(table, order=order)):
                    said.append(f"{bad} rows of {table} are not as they were stored")
        return runs, said

    def _gone(self) -> list[str]:
        """What is gone with all that counted it: of tables that number their rows, by the last
        number given; and environments that rows speak of."""
        last = {row["name"]: row["seq"] for row in self.query("SELECT * FROM sqlite_sequence")}
        said = []
        for table in filter(self.has, schema.NUMBERED):
            (row,) = self.query(f"SELECT count(*) AS there FROM {table} NOT INDEXED")
            gone = last.get(table, 0) - row["there"] if type(last.get(table, 0)) is int else -1
            if gone > 0:
                said.append(f"{gone} rows of {table} are gone")
            elif gone:
                said.append(f"how many rows of {table} there were is not as it was stored")
        known = "SELECT fingerprint FROM environment NOT INDEXED"
        lost = {
            row["fingerprint"]
            for table in filter(self.has, schema.OF_ENVIRONMENTS)
            for row in self.query(
                f"SELECT DISTINCT fingerprint FROM {table} NOT INDEXED "
                f"WHERE fingerprint NOT IN ({known})"
            )
        }
        if lost:
            said.append(f"{len(lost)} rows of environment are gone")
        return said

    @property
    def met(self) -> int:
        """How many damaged rows were met so far."""
        return len(self._damaged)
