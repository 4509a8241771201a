"""ledger.db: all evidence, written as it comes by the probe and the daemon.

Every row is committed before its method returns, in WAL mode with ``synchronous=NORMAL``: what was
committed is in the kernel's hands, so a process killed at any moment loses nothing of it; a power
cut may lose the last rows and cannot damage the file. FULL would sync the disk for every row, and
rows come while a GPU is being timed. `finish_run` and every publication sync what came before.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from . import codec, opening, state
from .errors import StateError, translate
from .rows import (
    Audit,
    Build,
    Environment,
    Evidence,
    Finding,
    Generation,
    Probed,
    Run,
    Stamp,
    Timing,
    Verdict,
)

TABLES: dict[type, str] = {
    Evidence: "evidence",
    Finding: "finding",
    Timing: "timing",
    Verdict: "verdict",
    Build: "build",
    Audit: "audit",
    Probed: "probed",
}

Row = TypeVar("Row", Evidence, Finding, Timing, Verdict)
Added = Evidence | Finding | Timing | Verdict | Build | Audit | Probed


class Ledger:
    """An open ledger. Use `Ledger.open`; safe to share between threads, not across a fork."""

    def __init__(self, path: str, conn: sqlite3.Connection, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._conn = conn
        self._conn.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        self._runs: dict[str, state.exclusive] = {}

    @classmethod
    def open(
        cls, state_dir: str | os.PathLike[str] | None = None, *, readonly: bool = False
    ) -> Ledger:
        """Open the ledger of `state_dir` (default: where writers write), making it if need be.

        With `readonly` nothing is written, and a ledger on a read-only disk opens too. Runs whose
        process died are marked ``interrupted``. Raises a StateError, having changed nothing, for a
        file that is damaged, another program's, or a newer fp4tune's.
        """
        place = str(state.directory(state_dir))
        path = os.path.join(place, state.LEDGER)
        try:
            if readonly:
                return cls(path, opening.to_read(path), readonly=True)
            ledger = cls(path, opening.to_write(path), readonly=False)
        except (sqlite3.Error, OSError) as error:
            raise translate(error, path) from error
        try:
            ledger._mark_interrupted()
        except BaseException:
            ledger._conn.close()
            raise
        return ledger

    def close(self) -> None:
        """Close; a run that was not finished becomes ``interrupted``."""
        with self._lock:
            for lock in self._runs.values():
                lock.release()
            if self._runs:
                with contextlib.suppress(StateError):
                    self._mark_interrupted()
            self._runs.clear()
            self._conn.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- writing

    def start_run(
        self,
        *,
        seed: int,
        level: str,
        profile: str,
        device: Mapping[str, Any],
        argv: Sequence[str] = (),
        versions: Mapping[str, str] | None = None,
    ) -> str:
        """Begin a run; returns its id, unique over all nodes and sorting by start time."""
        now = time.time()
        started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        run = f"{started}-{secrets.token_hex(4)}"
        lock = state.exclusive(self._run_lock(run), f"run {run}").acquire()
        row = Run(
            run, now, None, "running", seed, level, profile, device, tuple(argv), versions or {}
        )
        try:
            self._insert("run", codec.columns(row))
        except BaseException:
            lock.release()
            raise
        self._runs[run] = lock
        return run

    def finish_run(self, run: str, status: str = "finished") -> None:
        """End a run as ``finished`` or ``failed``, and sync the ledger to the disk."""
        with self._transaction():
            self._conn.execute(
                "UPDATE run SET finished = ?, status = ? WHERE id = ?", (time.time(), status, run)
            )
        lock = self._runs.pop(run, None)
        if lock:
            _remove(lock.path)
            lock.release()
        self.sync()

    def add_environment(self, environment: Environment) -> str:
        """Record an environment once; its file stamps are replaced. Returns the fingerprint."""
        row = codec.columns(environment)
        row["first_seen"] = environment.first_seen or time.time()
        print_ = environment.fingerprint
        with self._transaction():
            self._insert("environment", row, "OR IGNORE")
            self._conn.execute("DELETE FROM stamp WHERE fingerprint = ?", (print_,))
            for stamp in environment.stamps:
                self._insert("stamp", {"fingerprint": print_, **codec.columns(stamp)})
        return print_

    def add_evidence(self, row: Evidence) -> int:
        """Commit one row of evidence; returns its id. The same holds for the other ``add_``."""
        return self._add(row)

    def add_finding(self, row: Finding) -> int:
        return self._add(row)

    def add_timing(self, row: Timing) -> int:
        return self._add(row)

    def add_verdict(self, row: Verdict) -> int:
        return self._add(row)

    def add_build(self, row: Build) -> int:
        return self._add(row)

    def add_audit(self, row: Audit) -> int:
        return self._add(row)

    def add_probed(self, row: Probed) -> int:
        return self._add(row)

    def add_all(self, rows: Iterable[Added]) -> list[int]:
        """Commit several rows as one: all of them or, on an error, none."""
        with self._transaction():
            return [self._add(row) for row in rows]

    def sync(self) -> None:
        """Put everything committed so far on the disk, proof against a power cut."""
        with self._lock, self._translated():
            self._conn.execute("PRAGMA wal_checkpoint(PASSIVE)")

    # -- reading

    def runs(self) -> list[Run]:
        """Every run, oldest first; one whose process is gone is ``interrupted``."""
        rows = self._select("SELECT * FROM run ORDER BY started, id", ())
        return [codec.decode(Run, self._settled(dict(row))) for row in rows]

    def environments(self, fingerprints: Iterable[str] | None = None) -> list[Environment]:
        """Environments with their stamps, in the order they were first seen."""
        where, values = _where(fingerprints=fingerprints)
        rows = self._select(
            f"SELECT * FROM environment{where} ORDER BY first_seen, fingerprint", values
        )
        stamps: dict[str, list[Stamp]] = {}
        for row in self._select(f"SELECT * FROM stamp{where} ORDER BY path", values):
            found = codec.decode(Stamp, dict(row))
            stamps.setdefault(row["fingerprint"], []).append(found)
        return [
            codec.decode(
                Environment, {**dict(row), "stamps": tuple(stamps.get(row["fingerprint"], ()))}
            )
            for row in rows
        ]

    def evidence(self, **filters: Any) -> list[Evidence]:
        """Evidence in the order it came. Filters, all optional, the same for the next three:
        `fingerprints` (several), `run`, `backend`, `tactic`, `bucket` (a BucketKey)."""
        return self._find(Evidence, filters)

    def findings(self, **filters: Any) -> list[Finding]:
        return self._find(Finding, filters)

    def timings(self, **filters: Any) -> list[Timing]:
        return self._find(Timing, filters)

    def verdicts(self, **filters: Any) -> list[Verdict]:
        return self._find(Verdict, filters)

    def builds(self, run: str | None = None) -> list[Build]:
        where, values = _where(run=run)
        rows = self._select(f"SELECT * FROM build{where} ORDER BY id", values)
        return [codec.decode(Build, dict(row)) for row in rows]

    def audits(self, content: str | None = None) -> list[Audit]:
        """Audits in the order they were made; with `content`, those of one file's bytes."""
        where, values = (" WHERE content = ?", [content]) if content is not None else ("", [])
        rows = self._select(f"SELECT * FROM audit{where} ORDER BY id", values)
        return [codec.decode(Audit, dict(row)) for row in rows]

    def probed(self, n: int | None = None, k: int | None = None) -> list[Probed]:
        """Layers probed to their end, in that order; with `n` and `k`, those of that shape."""
        where, values = (" WHERE n = ? AND k = ?", [n, k]) if n is not None else ("", [])
        rows = self._select(f"SELECT * FROM probed{where} ORDER BY id", values)
        return [codec.decode(Probed, dict(row)) for row in rows]

    # -- generations of choices.db; `publish` uses these

    def generations(self) -> list[Generation]:
        """Every publication, oldest first."""
        rows = self._select(
            "SELECT number, at, status, origin, digest FROM generation ORDER BY number", ()
        )
        return [codec.decode(Generation, dict(row)) for row in rows]

    def reserve_generation(self, above: int, origin: str) -> int:
        """A number higher than `above` and than every one before, never given out again."""
        with self._transaction():
            last = self._conn.execute("SELECT max(number) FROM generation").fetchone()[0]
            number: int = max(last or 0, above) + 1
            row = {"number": number, "at": time.time(), "status": "writing", "origin": origin}
            self._insert("generation", row)
        return number

    def set_generation(self, number: int, **values: Any) -> None:
        """Set `status`, `digest` or `content` (bytes or None) of one generation."""
        assignments = ", ".join(f"{name} = ?" for name in values)
        with self._transaction():
            self._conn.execute(
                f"UPDATE generation SET {assignments} WHERE number = ?", (*values.values(), number)
            )

    def generation_content(self, number: int) -> bytes | None:
        """What `number` published, or None if it is unknown or was pruned."""
        rows = self._select("SELECT content FROM generation WHERE number = ?", (number,))
        return rows[0]["content"] if rows else None

    def kept_generations(self) -> list[int]:
        """The numbers whose content is kept, ascending, whatever became of them."""
        sql = "SELECT number FROM generation WHERE content IS NOT NULL ORDER BY number"
        return [row["number"] for row in self._select(sql, ())]

    # -- the machinery

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise ValueError(f"the ledger refused a row: {error}") from error
        except sqlite3.Error as error:
            raise translate(error, self.path) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One transaction, taken for writing from the start so that it cannot fail half-way for
        another writer's sake; inside another, part of that one."""
        with self._lock, self._translated():
            if self._conn.in_transaction:
                yield
                return
            self._conn.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._conn.execute("COMMIT")
            except BaseException:
                if self._conn.in_transaction:
                    self._conn.execute("ROLLBACK")
                raise

    def _insert(self, table: str, row: Mapping[str, Any], how: str = "") -> int:
        marks = ", ".join("?" * len(row))
        with self._lock, self._translated():
            cursor = self._conn.execute(
                f"INSERT {how} INTO {table} ({', '.join(row)}) VALUES ({marks})",
                tuple(row.values()),
            )
        return cursor.lastrowid or 0

    def _add(self, row: Added) -> int:
        values = codec.columns(row)
        values.pop("id")
        values["at"] = row.at if row.at is not None else time.time()
        return self._insert(TABLES[type(row)], values)

    def _select(self, sql: str, values: Sequence[Any]) -> list[sqlite3.Row]:
        with self._lock, self._translated():
            return self._conn.execute(sql, tuple(values)).fetchall()

    def _find(self, kind: type[Row], filters: Mapping[str, Any]) -> list[Row]:
        where, values = _where(**filters)
        rows = self._select(f"SELECT * FROM {TABLES[kind]}{where} ORDER BY id", values)
        return [codec.decode(kind, dict(row)) for row in rows]

    def _run_lock(self, run: str) -> str:
        return state.lock_file(os.path.dirname(self.path), "run", run)

    def _settled(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["status"] == "running" and not (
            row["id"] in self._runs or state.held(self._run_lock(row["id"]))
        ):
            row["status"] = "interrupted"
        return row

    def _mark_interrupted(self) -> None:
        # The lock and not a process number: it also tells across containers that share the place.
        running = self._select("SELECT id, status FROM run WHERE status = 'running'", ())
        for row in running:
            if self._settled(dict(row))["status"] == "interrupted":
                with self._transaction():
                    self._conn.execute(
                        "UPDATE run SET status = 'interrupted' WHERE id = ? AND status = 'running'",
                        (row["id"],),
                    )
                _remove(self._run_lock(row["id"]))


def _where(fingerprints: Iterable[str] | None = None, **equal: Any) -> tuple[str, list[Any]]:
    """A WHERE clause. Raises TypeError for a filter there is no column for."""
    terms: list[str] = []
    values: list[Any] = []
    if fingerprints is not None:
        terms.append("fingerprint IN (SELECT value FROM json_each(?))")
        values.append(json.dumps(list(fingerprints)))
    for name, value in equal.items():
        if value is None:
            continue
        if name == "bucket":
            for column in codec.BUCKET:
                terms.append(f"{column} = ?")
                values.append(getattr(value, column))
        elif name in ("run", "backend", "tactic"):
            terms.append(f"{name} = ?")
            values.append(value)
        else:
            raise TypeError(f"there is no filter {name!r}")
    return (" WHERE " + " AND ".join(terms) if terms else ""), values


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
