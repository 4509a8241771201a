"""choices.db, published: built aside, made durable, and renamed into place in one step.

A reader sees the old file or the new one, never a part of either. Generations only go up: a
rollback publishes the old content under a new number.
"""

from __future__ import annotations

import contextlib
import filecmp
import glob
import json
import os
import secrets
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .. import __version__
from ..machine import files
from . import codec, snapshot, state
from .errors import Corrupt, Missing, StateError, translate
from .ledger import Ledger
from .rows import Candidate, Choice, Environment, Layer

KEEP = 32
"""How many published generations keep their content in the ledger, to roll back to."""
LINKED = 8
"""How many generations stay readable under their own names, for ranks that pinned them."""
RESERVED = ("generation", "digest", snapshot.PAGE_DIGEST, "schema", "published", "fp4tune")


def publish(
    state_dir: str | os.PathLike[str] | None,
    choices: Sequence[Choice],
    candidates: Sequence[Candidate],
    environments: Iterable[Environment],
    meta: Mapping[str, Any] | None = None,
    layers: Sequence[Layer] = (),
) -> int:
    """Publish these rows as the next generation of choices.db; returns its number.

    The file then holds these rows and no others. `meta` is anything JSON holds; the keys in
    RESERVED are the publication's own.

    Raises a StateError with the published file untouched and nothing left beside it (Full,
    ReadOnly, Busy when another process publishes for a minute, NewerSchema or Foreign for a
    choices.db that is not ours to replace), and ValueError for rows that contradict each other.
    """
    environments = list(environments)
    taken = [key for key in RESERVED if key in (meta or {})]
    if taken:
        raise ValueError(f"meta key {taken[0]!r} is the publication's own")
    _check(choices, candidates, environments)
    tables: dict[str, list[dict[str, Any]]] = {
        "meta": [
            {"key": key, "value": codec.canonical(value)} for key, value in (meta or {}).items()
        ],
        "environment": [_without(codec.columns(e), "first_seen") for e in environments],
        "stamp": [
            {"fingerprint": e.fingerprint, **codec.columns(s)}
            for e in environments
            for s in e.stamps
        ],
        "choice": [codec.columns(c) for c in choices],
        "candidate": [codec.columns(c) for c in candidates],
        "layer": [codec.columns(layer) for layer in layers],
    }
    with Ledger.open(state_dir) as ledger:
        return _publish(ledger, lambda _: (tables, "publish"))


def rollback(state_dir: str | os.PathLike[str] | None, to: int | None = None) -> int:
    """Publish generation `to` again under a new, higher number, and return that.

    Without `to`: the last one published before the current one that is kept. Its content comes
    from the ledger, or from the file kept beside choices.db. Raises Missing where neither has it.
    """
    with Ledger.open(state_dir) as ledger:
        return _publish(ledger, lambda current: _earlier(ledger, current, to))


def kept(ledger: Ledger) -> list[int]:
    """The generations that can be rolled back to, ascending: published, and still there in the
    ledger or under a name of their own."""
    published = {g.number for g in ledger.generations() if g.status == "published"}
    held = published.intersection(ledger.kept_generations())
    return sorted(held.union(state.generations(os.path.dirname(ledger.path))))


def _earlier(
    ledger: Ledger, current: snapshot.Snapshot | None, to: int | None
) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The rows of generation `to`, and where they come from. Raises Missing."""
    if to is not None:
        wanted = [to]
    else:
        known = kept(ledger)
        done = [g.number for g in ledger.generations() if g.status == "published"]
        last = max([*known, *done, current.generation if current else 0], default=0)
        wanted = [number for number in reversed(known) if number < last]
        if not wanted:
            raise Missing(ledger.path, "there is no earlier generation to roll back to")
    for number in wanted:
        tables = _kept_rows(ledger, number)
        if tables is not None:
            return tables, f"rollback to {number}"
    raise Missing(ledger.path, f"the content of generation {wanted[0]} is not kept")


def _kept_rows(ledger: Ledger, number: int) -> dict[str, list[dict[str, Any]]] | None:
    """What one generation published, as `_build` takes it; None where nothing whole is left."""
    content = ledger.generation_content(number)
    if content is not None:
        with contextlib.suppress(zlib.error, ValueError):
            tables: dict[str, list[dict[str, Any]]] = json.loads(zlib.decompress(content))
            return tables
    path = state.generation_file(os.path.dirname(ledger.path), number)
    try:
        loaded = snapshot.load(path)
    except StateError:
        return None
    if loaded.generation != number:
        return None
    found = {table: [_encoded(row) for row in rows] for table, rows in loaded.tables.items()}
    found["meta"] = [
        {"key": key, "value": codec.canonical(value)}
        for key, value in loaded.meta.items()
        if key not in RESERVED
    ]
    return found


def _encoded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as SQLite takes it: what was decoded when it was loaded is JSON again."""
    return {k: codec.canonical(v) if k in snapshot.STRUCTURED else v for k, v in row.items()}


def restore(state_dir: str | os.PathLike[str]) -> int | None:
    """Put the last generation back in place from the file kept beside it, where choices.db is gone
    or damaged; its number, or None where there was nothing to do or nothing to do it with.

    Needs no ledger, and no room on the disk. Raises Busy while another process publishes, and
    StateError.
    """
    place = os.fspath(state_dir)
    target = os.path.join(place, state.CHOICES)
    numbers = state.generations(place)
    if not numbers:
        return None
    with state.exclusive(state.lock_file(place, "publish"), "the publication"):
        try:
            snapshot.load(target)
            return None
        except (Missing, Corrupt):
            pass
        kept = state.generation_file(place, numbers[-1])
        temporary = os.path.join(place, f".{state.CHOICES}.{secrets.token_hex(8)}")
        try:
            if snapshot.load(kept).generation != numbers[-1]:
                return None
            _copy(kept, temporary)
            _replace(temporary, target)
        except (Missing, Corrupt):
            return None  # damaged as well
        except OSError as error:
            raise translate(error, target) from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return numbers[-1]


def _publish(
    ledger: Ledger,
    rows: Callable[[snapshot.Snapshot | None], tuple[dict[str, list[dict[str, Any]]], str]],
) -> int:
    """Publish what `rows` gives of what is published now: tables, and where they come from."""
    place = os.path.dirname(ledger.path)
    target = os.path.join(place, state.CHOICES)
    lock = state.exclusive(state.lock_file(place, "publish"), "the publication", wait=60)
    with lock:
        _sweep(place)
        current = _settle(ledger, target)
        tables, origin = rows(current)
        # Above those that are kept, too: a ledger may have been lost, and numbers only go up.
        last = max([current.generation if current else 0, *state.generations(place)])
        number = ledger.reserve_generation(last, origin)
        temporary = os.path.join(place, f".{state.CHOICES}.{secrets.token_hex(8)}")
        digest = None
        try:
            ledger.sync()  # the evidence is on the disk before the choice that rests on it
            digest = _build(temporary, tables, number)
            content = zlib.compress(json.dumps(tables).encode())
            ledger.set_generation(number, digest=digest, content=content)
            if current:
                _keep(target, current.generation)
            _replace(temporary, target)
        except BaseException as error:
            with contextlib.suppress(StateError):
                # An interruption may have come after the rename.
                if digest is not None and _digest(_loaded_or_none(target)) == digest:
                    ledger.set_generation(number, status="published")
                else:
                    ledger.set_generation(number, status="abandoned", content=None)
            if isinstance(error, (sqlite3.Error, OSError)):
                raise translate(error, target) from error
            raise
        finally:
            _sweep(place)
        _keep(target, number)
        # Published; should these fail, the next publication finds out from the file itself.
        with contextlib.suppress(StateError):
            ledger.set_generation(number, status="published")
            # Of those alone that were published: attempts that failed take no place of theirs.
            held = ledger.kept_generations()
            of = {g.number: g.status for g in ledger.generations()}
            done = [n for n, status in of.items() if status == "published"][-KEEP:]
            doubt = [n for n in held if of.get(n) == "abandoned" and n > done[0]][-KEEP:]
            for old in set(held).difference(done, doubt):
                ledger.set_generation(old, content=None)
    return number


def _settle(ledger: Ledger, target: str) -> snapshot.Snapshot | None:
    """What is published now, None without it; and note what became of publishers that died.

    A damaged file counts as none, since publishing is what mends it; another program's file, or a
    newer fp4tune's, is not replaced.
    """
    try:
        there = snapshot.load(target)
    except (Missing, Corrupt):
        there = None
    for row in ledger.generations():
        if row.status == "writing":
            kept = state.generation_file(os.path.dirname(target), row.number)
            if row.digest is not None and row.digest in (
                _digest(there),
                _digest(_loaded_or_none(kept)),
            ):
                ledger.set_generation(row.number, status="published")
            elif row.digest is not None and there is None:
                # It was ready; whether it came to be published the damaged file does not say. It
                # takes no place of those that were, and its content stays as long as they do.
                ledger.set_generation(row.number, status="abandoned")
            else:
                ledger.set_generation(row.number, status="abandoned", content=None)
    return there


def _loaded_or_none(path: str) -> snapshot.Snapshot | None:
    try:
        return snapshot.load(path)
    except StateError:
        return None


def _digest(found: snapshot.Snapshot | None) -> str | None:
    return found.digest if found is not None else None


def _build(path: str, tables: dict[str, list[dict[str, Any]]], generation: int) -> str:
    """Write a whole, verified, durable snapshot file at `path`; returns its digest."""
    conn = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for statement in snapshot.SCHEMA:
            conn.execute(statement)
        conn.execute(f"PRAGMA application_id = {snapshot.APPLICATION_ID}")
        conn.execute(f"PRAGMA user_version = {snapshot.VERSION}")
        own = {
            "generation": generation,
            "schema": snapshot.VERSION,
            "published": time.time(),
            "fp4tune": __version__,
        }
        for table, rows in tables.items():
            for row in rows:
                _insert(conn, table, row)
        for key, value in own.items():
            _insert(conn, "meta", {"key": key, "value": codec.canonical(value)})
        # Of what SQLite stored and not of what it was given: a column may turn 5 into 5.0.
        stored = snapshot.read_tables(conn)
        bodies = snapshot.pages(stored)
        for name, body in bodies.items():
            _insert(conn, "page", {"name": name, "body": body})
        own_digest = snapshot.pages_digest(
            {row["key"]: row["value"] for row in stored["meta"]},
            [tuple(row.values()) for row in stored["stamp"]],
            bodies,
        )
        _insert(conn, "meta", {"key": snapshot.PAGE_DIGEST, "value": codec.canonical(own_digest)})
        digest = snapshot.digest(snapshot.read_tables(conn))
        _insert(conn, "meta", {"key": "digest", "value": codec.canonical(digest)})
        # Unlike a copy or backup(), VACUUM INTO leaves no WAL mark in the header.
        conn.execute("VACUUM INTO ?", (path,))
    finally:
        conn.close()
    read = snapshot.load_pages(path)
    if snapshot.load(path).digest != digest or len(read.names) != len(bodies) - 1:
        raise Corrupt(path, "what was written is not what is read back")
    _finish(path)
    return digest


def _insert(conn: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> None:
    marks = ", ".join("?" * len(row))
    try:
        conn.execute(
            f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values())
        )
    except sqlite3.IntegrityError as error:
        raise ValueError(f"two rows of {table} say different things of one bucket") from error


def _replace(temporary: str, target: str) -> None:
    os.rename(temporary, target)
    # Where that cannot survive a power cut, such a cut brings the one before back, whole.
    files.settle(os.path.dirname(target))


def _keep(target: str, generation: int) -> None:
    """Keep the published file under a name of its own, and drop the oldest of those.

    A rank that starts while a newer generation is published still finds the one its fellows have.
    It is a convenience: where no file can be made, such a rank says so and falls back.
    """
    place = os.path.dirname(target)
    name = state.generation_file(place, generation)
    aside = os.path.join(place, f".{state.CHOICES}.{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        # One with other content is of a history that was lost, and whose numbers came again.
        if not os.path.exists(name) or not filecmp.cmp(name, target, shallow=False):
            _copy(target, aside)
            os.replace(aside, name)
    kept = [number for number in state.generations(place) if number <= generation]
    for number in set(state.generations(place)) - set(kept[-LINKED:]):
        with contextlib.suppress(OSError):
            os.unlink(state.generation_file(place, number))


def _copy(source: str, path: str) -> None:
    """A durable copy of a published file, so that damage to one leaves the other; where there is no
    room for it, a link."""
    try:
        shutil.copyfile(source, path)
        _finish(path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.link(source, path)


def _finish(path: str) -> None:
    """Make a new file readable to all, writable to nobody, and durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o444)
        os.fsync(fd)
    finally:
        os.close(fd)


def _sweep(place: str) -> None:
    """Remove unfinished files, ours or a killed publisher's; only under the publication's lock."""
    pattern = os.path.join(glob.escape(place), f".{state.CHOICES}.*")
    for path in glob.glob(pattern):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _check(
    choices: Sequence[Choice], candidates: Sequence[Candidate], environments: list[Environment]
) -> None:
    known = {e.fingerprint for e in environments}
    judged = {(c.scope, c.bucket, c.backend, c.tactic): c for c in candidates}
    highest: dict[Any, Choice] = {}
    for choice in sorted(choices, key=lambda c: c.bucket.m_lo):
        bucket = choice.bucket
        shape = (choice.scope, *(getattr(bucket, f) for f in codec.BUCKET if f[:2] != "m_"))
        before = highest.get(shape)
        if before and bucket.m_lo <= before.bucket.m_hi:
            raise ValueError(f"two choices for m={bucket.m_lo}, n={bucket.n}, k={bucket.k}")
        highest[shape] = choice
        if choice.status != "safe":
            continue
        if choice.fingerprint not in known:
            raise ValueError(f"{choice.backend} is called safe without a known environment")
        candidate = judged.get((choice.scope, bucket, choice.backend, choice.tactic))
        if candidate is None or candidate.verdict != "safe":
            raise ValueError(f"{choice.backend} {choice.tactic} is chosen as safe, not judged safe")


def _without(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != column}
