"""ledger.db: all evidence, written as it comes by the probe and the daemon.

Every row is committed before its method returns, in WAL mode with ``synchronous=NORMAL``: what was
committed is in the kernel's hands, so a process killed at any moment loses nothing of it; a power
cut may lose the last rows and cannot damage the file. FULL would sync the disk for every row, and
rows come while a GPU is being timed. `finish_run` and every publication sync what came before.

Every row is sealed, and so are the rows of a run together (`seal`). What is read is what was
stored: rows that a disk changed are left out, `damaged` says so of a run and `damage` of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    FinishedStep,
    Forgotten,
    Generation,
    Probed,
    Run,
    Stamp,
    Timing,
    Verdict,
    without_forgotten,
)
from .sealed import SealedTables

TABLES: dict[type, str] = {
    Evidence: "evidence",
    Finding: "finding",
    Timing: "timing",
    Verdict: "verdict",
    Build: "build",
    Audit: "audit",
    Probed: "probed",
    FinishedStep: "step",
    Forgotten: "forgotten",
}

Row = TypeVar(
    "Row", Evidence, Finding, Timing, Verdict, Build, Audit, Probed, FinishedStep, Forgotten
)
Added = Evidence | Finding | Timing | Verdict | Build | Audit | Probed | FinishedStep | Forgotten


TAKEN_BACK = ("evidence", "finding", "timing", "verdict", "build", "probed", "step")
"""Tables whose rows can be taken back."""


@dataclass(frozen=True, slots=True)
class LedgerDamage:
    """What of a ledger is not as it was stored: by run what is wrong with it, and what of rows
    that belong to none."""

    runs: Mapping[str, str]
    others: Sequence[str]

    @property
    def sentences(self) -> list[str]:
        """One for each run, and for what belongs to none."""
        return [*(set_aside(run, why) for run, why in self.runs.items()), *self.others]


def set_aside(run: str, why: str) -> str:
    """A damaged run, and what becomes of it, in a sentence."""
    return (
        f"run {run} is set aside, {why}; the failures that are left of it count, and the rest is "
        "measured anew"
    )


class Ledger:
    """An open ledger. Use `Ledger.open`; safe to share between threads, not across a fork."""

    def __init__(self, path: str, conn: sqlite3.Connection, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._conn = conn
        self._tables = SealedTables(path, conn, readonly)
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
            conn = opening.to_read(path) if readonly else opening.to_write(path)
            try:
                ledger = cls(path, conn, readonly)
            except BaseException:
                conn.close()
                raise
            if readonly:
                return ledger
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            raise translate(error, path) from error
        try:
            ledger._mark_interrupted()
        except BaseException:
            ledger._conn.close()
            raise
        return ledger

    def close(self) -> None:
        """Close; a run that was not finished becomes ``interrupted``."""
        with self._tables.lock:
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
            with self.together():
                self._tables.insert("run", codec.columns(row))
                self._tables.begin(run)
        except BaseException:
            lock.release()
            raise
        self._runs[run] = lock
        return run

    def finish_run(self, run: str, status: str = "finished") -> None:
        """End a run as ``finished`` or ``failed``, and sync the ledger to the disk."""
        self._tables.update("run", "id", run, finished=time.time(), status=status)
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
        with self.together():
            known = self._tables.select("environment", " WHERE fingerprint = ?", [print_], "rowid")
            if not known:
                # One that is damaged is mended: its print stands for what it says.
                self._conn.execute(
                    "INSERT INTO environment (fingerprint, backend, arch, facts, first_seen) "
                    "VALUES (:fingerprint, :backend, :arch, :facts, :first_seen) "
                    "ON CONFLICT (fingerprint) DO UPDATE SET backend = excluded.backend, "
                    "arch = excluded.arch, facts = excluded.facts, "
                    "first_seen = excluded.first_seen",
                    row,
                )
            self._conn.execute("DELETE FROM stamp WHERE fingerprint = ?", (print_,))
            self._conn.executemany(
                "INSERT INTO stamp (fingerprint, path, inode, size, mtime_ns) "
                "VALUES (?, ?, ?, ?, ?)",
                [(print_, *codec.columns(stamp).values()) for stamp in environment.stamps],
            )
            self._tables.reseal("environment", "fingerprint", print_)
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

    def add_step(self, row: FinishedStep) -> int:
        return self._add(row)

    def add_all(self, rows: Iterable[Added]) -> list[int]:
        """Commit several rows as one: all of them or, on an error, none."""
        with self.together():
            return [self._add(row) for row in rows]

    def together(self) -> contextlib.AbstractContextManager[None]:
        """What is added within is committed at its end, all of it or, on an error, none. Other
        threads wait for that, so nothing slow belongs in it."""
        return self._tables.transaction()

    def sync(self) -> None:
        """Put everything committed so far on the disk, proof against a power cut."""
        with self._tables.lock, self._tables.translated():
            self._conn.execute("PRAGMA wal_checkpoint(PASSIVE)")

    # -- what is damaged

    def damaged(self, run: str) -> str:
        """What of a run is not as it was stored, in a few words; empty where all of it is."""
        return self._tables.damaged(run)

    def damage(self) -> LedgerDamage:
        """Every row looked at. Raises a StateError where the file cannot be read."""
        runs, others = self._tables.damage()
        return LedgerDamage(runs, [*others, *opening.lost_logs(self.path)])

    # -- reading

    def runs(self) -> list[Run]:
        """Every run, oldest first; one whose process is gone is ``interrupted``."""
        rows = self._tables.select("run", order="started, id")
        return [codec.decode(Run, self._settled(row)) for row in rows]

    def environments(self, fingerprints: Iterable[str] | None = None) -> list[Environment]:
        """Environments with their stamps, in the order they were first seen."""
        where, values = _where(fingerprints=fingerprints)
        order = "first_seen, fingerprint"
        with self._tables.transaction(writes=False):
            rows = self._tables.select("environment", where, values, order)
            stamps: dict[str, list[Stamp]] = {}
            for row in self._tables.query(f"SELECT * FROM stamp{where} ORDER BY path", values):
                print_ = row["fingerprint"]
                stamps.setdefault(print_, []).append(codec.decode(Stamp, row))
        return [
            codec.decode(Environment, {**row, "stamps": tuple(stamps.get(row["fingerprint"], ()))})
            for row in rows
        ]

    def evidence(self, **filters: Any) -> list[Evidence]:
        """Evidence in the order it came. Filters, all optional, the same for the next three:
        `fingerprints` (several), `run`, `backend`, `tactic`, `bucket` (a BucketKey); `status` of
        evidence and verdicts."""
        return self._find(Evidence, filters)

    def findings(self, newest: int | None = None, **filters: Any) -> list[Finding]:
        """Findings in the order they came; with `newest` so many of the last."""
        return self._find(Finding, filters, newest)

    def timings(self, **filters: Any) -> list[Timing]:
        return self._find(Timing, filters)

    def verdicts(self, **filters: Any) -> list[Verdict]:
        return self._find(Verdict, filters)

    def steps(self, n: int | None = None, k: int | None = None) -> list[FinishedStep]:
        """Steps that were finished, in that order; with `n` and `k`, those of that shape."""
        return self._find(FinishedStep, {"n": n, "k": k})

    def builds(self, run: str | None = None) -> list[Build]:
        return self._find(Build, {"run": run})

    def audits(self, content: str | None = None) -> list[Audit]:
        """Audits in the order they were made; with `content`, those of one file's bytes."""
        return self._find(Audit, {"content": content})

    def probed(self, n: int | None = None, k: int | None = None) -> list[Probed]:
        """Layers probed to their end, in that order; with `n` and `k`, those of that shape."""
        return self._find(Probed, {"n": n, "k": k})

    # -- what was taken back

    def forget(self, row: Forgotten) -> Forgotten:
        """Take back what `row` names, as far as it is there now: nothing here answers with it any
        more. It is not removed, and the reason stays. Returns the row as it is stored."""
        with self.together():
            number = self._add(row)
            (made,) = (each for each in self.forgotten() if each.id == number)
        return made

    def forgotten(self) -> list[Forgotten]:
        """Everything that was taken back, and why, in that order."""
        if not self._tables.has("forgotten"):
            return []
        return [codec.decode(Forgotten, row) for row in self._tables.select("forgotten")]

    def count(self, table: str, row: Forgotten) -> int:
        """How many rows of a table `row` would take back, that were not taken back before."""
        before = self.forgotten()
        rows = self._tables.select(table)
        if table == "probed":
            every = [without_forgotten(codec.decode(Probed, each), before) for each in rows]
            return sum(without_forgotten(each, [row]) != each for each in every)
        left = [each for each in rows if not any(other.covers(table, each) for other in before)]
        return sum(row.covers(table, each) for each in left)

    def last(self) -> dict[str, int]:
        """The newest id of every table of evidence: what is there now."""
        return {
            table: self._tables.query(f"SELECT coalesce(max(id), 0) AS last FROM {table}")[0][
                "last"
            ]
            for table in TAKEN_BACK
        }

    # -- generations of choices.db; `publish` uses these

    def generations(self) -> list[Generation]:
        """Every publication, oldest first."""
        rows = self._tables.select("generation", order="number")
        return [codec.decode(Generation, row) for row in rows]

    def reserve_generation(self, above: int, origin: str) -> int:
        """A number higher than `above` and than every one before, never given out again."""
        with self.together():
            # Of those that are whole: a number that a disk made is none to count on from.
            number = max([above, *(each.number for each in self.generations())]) + 1
            taken = {row["number"] for row in self._tables.query("SELECT number FROM generation")}
            while number in taken:
                number += 1
            row = {"number": number, "at": time.time(), "status": "writing", "origin": origin}
            self._tables.insert("generation", row)
        return number

    def set_generation(self, number: int, **values: Any) -> None:
        """Set `status`, `digest` or `content` (bytes or None) of one generation."""
        self._tables.update("generation", "number", number, **values)

    def generation_content(self, number: int) -> bytes | None:
        """What `number` published, or None if it is unknown, damaged, or was pruned."""
        rows = self._tables.select("generation", " WHERE number = ?", [number], "number")
        return rows[0]["content"] if rows else None

    def kept_generations(self) -> list[int]:
        """The numbers whose content is kept, ascending, whatever became of them."""
        sql = "SELECT number FROM generation WHERE content IS NOT NULL ORDER BY number"
        return [row["number"] for row in self._tables.query(sql)]

    # -- the machinery

    def _columns(self, row: Added) -> dict[str, Any]:
        values = codec.columns(row)
        values.pop("id")
        values["at"] = row.at if row.at is not None else time.time()
        return values

    def _add(self, row: Added) -> int:
        return self._tables.insert(TABLES[type(row)], self._columns(row))

    def _find(
        self, kind: type[Row], filters: Mapping[str, Any], newest: int | None = None
    ) -> list[Row]:
        table = TABLES[kind]
        if not self._tables.has(table):
            return []
        where, values = _where(**filters)
        order = "id" if newest is None else f"id DESC LIMIT {int(newest)}"
        rows = sorted(self._tables.select(table, where, values, order), key=lambda r: r["id"])
        if table in TAKEN_BACK and (taken_back := self.forgotten()):
            rows = [r for r in rows if not any(each.covers(table, r) for each in taken_back)]
        return [codec.decode(kind, row) for row in rows]

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
        for row in self._tables.select("run", " WHERE status = 'running'"):
            if self._settled(dict(row))["status"] == "interrupted":
                with self.together():
                    now = self._tables.select("run", " WHERE id = ?", [row["id"]])
                    if now and now[0]["status"] == "running":
                        self._tables.update("run", "id", row["id"], status="interrupted")
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
        elif name in ("run", "backend", "tactic", "status", "n", "k", "content"):
            terms.append(f"{name} = ?")
            values.append(value)
        else:
            raise TypeError(f"there is no filter {name!r}")
    return (" WHERE " + " AND ".join(terms) if terms else ""), values


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
