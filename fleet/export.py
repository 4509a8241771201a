"""A node's databases as a bundle."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..autotune.publication import published
from ..cache import codec, state
from ..cache.errors import Missing, StateError, translate
from ..cache.ledger import Ledger
from . import bundle, schema
from .places import Place

NODE = "node"
"""The file in a state directory that keeps this node's id."""
_NODE = re.compile(r"[0-9a-f]{32}\n?")


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle that was written, where to, and how many rows of each table it has."""

    path: str
    id: str
    node: str
    bytes: int
    rows: dict[str, int]
    signed: bool


def node_id(state_dir: Path) -> str:
    """This node's stable random id, 32 hex digits; made on the first call.

    Raises a StateError where it cannot be kept, or what is kept is none.
    """
    path = state_dir / NODE
    try:
        text = _text(path)
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
            text = _text(path)
    except OSError as error:
        raise translate(error, path) from error
    if text is None or not _NODE.fullmatch(text):
        raise StateError(path, "this is not a node id; remove the file to get a new one")
    return text.strip()


def _text(path: Path) -> str | None:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            return file.read(64)
    except FileNotFoundError:
        return None


def rows_of(state_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row a bundle carries, from ledger.db and choices.db.

    Left out are the command line of a run and the paths of files. Structured values too long for
    a bundle are replaced by a note. Raises StateError.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    with Ledger.open(state_dir, readonly=True) as ledger:
        found["run"] = [_columns("run", row) for row in ledger.runs()]
        found["environment"] = [_columns("environment", row) for row in ledger.environments()]
        found["evidence"] = [_columns("evidence", row) for row in ledger.evidence()]
        found["finding"] = [_columns("finding", row) for row in ledger.findings()]
        found["timing"] = [_columns("timing", row) for row in ledger.timings()]
        found["verdict"] = [_columns("verdict", row) for row in ledger.verdicts()]
    try:
        choices = published.load(state_dir).choices
    except Missing:
        choices = ()
    found["choice"] = [_columns("choice", row) for row in choices]
    return found


def _columns(table: str, row: Any) -> dict[str, Any]:
    values = codec.columns(row)
    return {
        name: _fitted(values[name], kind.rstrip("?")) for name, kind in schema.TABLES[table].items()
    }


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
    rows = rows_of(where)
    who = node or node_id(where)
    now = round(time.time(), 3)
    host = socket.gethostname() if hostname else None
    identity, data = bundle.pack(rows, who, now, host, key_file)
    target = Place(out)
    path: tuple[str, ...] = ()
    if out.endswith("/") or target.isdir():
        path = (f"{who[:12]}-{identity[:12]}{bundle.SUFFIX}",)
    try:
        target.write(data, *path)
    except OSError as error:
        raise translate(error, target.path(*path)) from error
    counts = {table: len(found) for table, found in rows.items()}
    return Exported(target.path(*path), identity, who, len(data), counts, key_file is not None)
