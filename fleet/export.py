"""A node's databases as a bundle."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..autotune.publication import published
from ..cache import codec, state
from ..cache.errors import Missing, StateError, translate
from ..cache.ledger import Ledger, LedgerDamage, set_aside
from ..errors import Refused, printable
from ..machine import files
from . import bundle, production, schema
from .places import Place

_MOST_NODE = 256
"""Bytes of the file of the node's id."""

NODE = "node"
"""The file in a state directory that keeps this node's id."""
_LIMITS = {
    "run": ("started", schema.MOST_FEW),
    "environment": ("first_seen", schema.MOST_FEW),
}
"""Table -> the column of its time, and most rows; else ``at`` and `bundle.MOST_ROWS`."""
_NODE = re.compile(r"[0-9a-f]{32}\n?")


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle that was written, where to, and how many rows of each table it has; `skipped` is
    how many rows of a table are not in it for which reason."""

    path: str
    id: str
    node: str
    bytes: int
    rows: dict[str, int]
    signed: bool
    skipped: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class NodeTables:
    """The rows a bundle carries, by table, and what had to be left out of it."""

    rows: dict[str, list[dict[str, Any]]]
    skipped: dict[str, dict[str, int]]


def node_id(state_dir: Path) -> str:
    """This node's stable random id, 32 hex digits; made on the first call.

    Raises a StateError where it cannot be kept, or what is kept is none.
    """
    path = state_dir / NODE
    try:
        text = _beginning(path)
        if text is None:
            state_dir.mkdir(parents=True, exist_ok=True)
            temporary = state_dir / f".{NODE}.{secrets.token_hex(8)}"
            temporary.write_text(secrets.token_hex(16) + "\n", encoding="ascii")
            try:
                os.link(temporary, path)  # the first of two exports at once wins
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
            text = _beginning(path)
    except OSError as error:
        raise translate(error, path) from error
    if text is None or not _NODE.fullmatch(text):
        raise StateError(path, "this is not a node id; remove the file to get a new one")
    return text.strip()


def _beginning(path: Path) -> str | None:
    try:
        return files.whole(path, _MOST_NODE).decode("ascii", "replace")
    except FileNotFoundError:
        return None


def rows_of(state_dir: Path) -> NodeTables:
    """Every row a bundle carries, from ledger.db and choices.db.

    Left out are the command line of a run and the paths of files. Structured values too long for
    a bundle are replaced by a note. A row that no store would take is left out, and so is what
    speaks of it; the others go. Of a run that is damaged the failures go that are left of it.
    Raises StateError.
    """
    with Ledger.open(state_dir, readonly=True) as ledger:
        damage = ledger.damage()
        found: dict[str, Sequence[Any]] = {
            "run": ledger.runs(),
            "environment": ledger.environments(),
            "evidence": ledger.evidence(),
            "finding": ledger.findings(),
            "timing": ledger.timings(),
            "verdict": ledger.verdicts(),
        }
    runs, evidence, findings = production.rows(state_dir, found["environment"])
    found["run"] = [*found["run"], *runs]
    found["evidence"] = [*found["evidence"], *evidence]
    found["finding"] = [*found["finding"], *findings]
    try:
        found["choice"] = published.load(state_dir).choices
    except Missing:
        found["choice"] = ()
    rows: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, Counter[str]] = {}
    for table in schema.TABLES:
        sound, lost = _sound(table, found[table], damage)
        flat, odd = _exportable(table, sound)
        odd += lost
        rows[table], unfit = schema.fitting(table, flat)
        skipped[table] = odd + unfit + _newest(table, rows)
    _drop_orphans(rows, skipped)
    return NodeTables(rows, {table: dict(why) for table, why in skipped.items() if why})


def _sound(
    table: str, found: Sequence[Any], damage: LedgerDamage
) -> tuple[Sequence[Any], Counter[str]]:
    """Rows without those of damaged runs that say that something is right or fast."""
    bad = [row for row in found if getattr(row, "run", None) in damage.runs]
    lost = [row for row in bad if table != "finding" and getattr(row, "status", "") != "failed"]
    reasons = Counter(f"{table}: {set_aside(r.run, damage.runs[r.run])}" for r in lost)
    if table == "run":  # what a bundle has no table for is told with the runs
        reasons += Counter(damage.others)
        there = {row.id for row in found}
        gone = [f"run: {set_aside(*each)}" for each in damage.runs.items() if each[0] not in there]
        reasons += Counter(gone)
    return [row for row in found if not any(row is each for each in lost)], reasons


def _exportable(table: str, found: Sequence[Any]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows as a bundle has them, without those that hold what no bundle can."""
    rows, odd = [], Counter[str]()
    for row in found:
        try:
            values = codec.columns(row)
        except (ValueError, TypeError) as error:
            odd[f"{table}: {printable(error, 200)}"] += 1
            continue
        kinds = schema.TABLES[table].items()
        rows.append({name: _fitted(values[name], kind.rstrip("?")) for name, kind in kinds})
    return rows, odd


def _newest(table: str, rows: dict[str, list[dict[str, Any]]]) -> Counter[str]:
    """Keep as many rows of a table as a bundle may have, the newest."""
    when, most = _LIMITS.get(table, ("at", bundle.MOST_ROWS))
    over = len(rows[table]) - most
    if over <= 0:
        return Counter()
    rows[table] = sorted(rows[table], key=lambda row: row.get(when) or 0.0)[over:]
    return Counter({f"{table}: older than the {most} that a bundle has room for": over})


def _drop_orphans(rows: dict[str, list[dict[str, Any]]], skipped: dict[str, Counter[str]]) -> None:
    """Without what speaks of a run or an environment that is not there."""
    runs = {row["id"] for row in rows["run"]}
    prints = {row["fingerprint"] for row in rows["environment"]}
    for table in ("evidence", "finding", "timing", "verdict"):
        kept = [r for r in rows[table] if r["run"] in runs and r["fingerprint"] in prints]
        if lost := len(rows[table]) - len(kept):
            skipped[table][f"{table}: its run or environment is left out"] += lost
        rows[table] = kept


def _fitted(value: Any, kind: str) -> Any:
    if isinstance(value, str) and kind == "json" and len(value) > schema.JSON:
        return codec.canonical({"left_out": f"{len(value)} characters"})
    if isinstance(value, str) and kind == "text":
        return "".join(c if c.isprintable() else " " for c in value)[: schema.TEXT]
    return value


def export(
    state_dir: Path | None,
    out: str,
    key_file: Path | None = None,
    hostname: bool = False,
    node: str | None = None,
) -> Exported:
    """Write this node's bundle to `out`: a file, or a folder (or fsspec URL of one) to put it in.

    Raises StateError for databases that cannot be read, Refused for a place that cannot be used.
    """
    where = state.directory(state_dir)
    tables = rows_of(where)
    rows = tables.rows
    who = node or node_id(where)
    now = round(time.time(), 3)
    host = socket.gethostname() if hostname else None
    identity, data = bundle.pack(rows, who, now, host, key_file)
    if not bundle.fits(data):
        # Its tables for other tools are not what a store reads.
        identity, data = bundle.pack(rows, who, now, host, key_file, parquet=False)
    if not bundle.fits(data):
        raise Refused(
            f"what {where} holds makes a bundle that no store takes: more than "
            f"{bundle.MOST_PACKED >> 20} MiB packed or {bundle.MOST_UNPACKED >> 20} MiB unpacked"
        )
    target = Place(out)
    path: tuple[str, ...] = ()
    if out.endswith("/") or target.isdir():
        path = (f"{who[:12]}-{identity[:12]}{bundle.SUFFIX}",)
    try:
        target.write(data, *path)
    except OSError as error:
        raise translate(error, target.path(*path)) from error
    counts = {table: len(found) for table, found in rows.items()}
    return Exported(
        target.path(*path), identity, who, len(data), counts, key_file is not None, tables.skipped
    )
