"""The bundle's tables: columns, their kinds, and checking rows that a stranger wrote.

Rows are flat: a bucket is eight columns, structured values are JSON text. Nothing in a row is ever
executed, imported or unpickled; a row that does not fit is a reason to refuse its whole bundle.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cache.codec import BUCKET
from ..cache.rows import CHOICES, EVIDENCE, RUNS, VERDICTS

VERSION = 1
"""Of the bundle; a reader refuses a newer one."""
FORMAT = "fp4tune-bundle"

TEXT = 4096
"""Most characters of a text."""
JSON = 1 << 16
"""Most characters of a structured value."""
_WHOLE = 1 << 62
MOST_FEW = 20_000
"""Most runs, and most environments, of one node: what looks them up holds them all."""
ARCH = re.compile(r"[A-Za-z0-9_.]{1,40}")
"""An architecture's name: a store has folders that are called so."""

_BUCKET = {
    name: ("name" if name in ("format", "activation", "out_dtype") else "int") for name in BUCKET
}
_WHAT = {
    "id": "int",
    "run": "name",
    "fingerprint": "digest",
    "backend": "name",
    "tactic": "text",
    **_BUCKET,
}

TABLES: dict[str, dict[str, str]] = {
    "run": {
        "id": "name",
        "started": "real",
        "finished": "real?",
        "status": "run status",
        "seed": "number",
        "level": "name",
        "profile": "name",
        "device": "device",
        "versions": "json",
    },
    "environment": {
        "fingerprint": "digest",
        "backend": "name",
        "arch": "arch",
        "facts": "json",
        "first_seen": "real?",
    },
    "evidence": {
        **_WHAT,
        "regime": "name",
        "data": "name",
        "status": "evidence status",
        "launches": "int",
        "problems": "int",
        "width": "int?",
        "seconds": "real",
        "detail": "json",
        "at": "real",
    },
    "finding": {
        **_WHAT,
        "problem": "json",
        "kind": "name",
        "regime": "name",
        "data": "name",
        "seed": "number",
        "launch": "int?",
        "condition": "json?",
        "detail": "json",
        "at": "real",
    },
    "timing": {
        **_WHAT,
        "median_us": "real",
        "lo_us": "real",
        "hi_us": "real",
        "samples": "int",
        "host_us": "real?",
        "detail": "json",
        "at": "real",
    },
    "verdict": {
        **_WHAT,
        "profile": "name",
        "status": "verdict",
        "conditions": "json",
        "reasons": "json",
        "bounds": "json",
        "at": "real",
    },
    "choice": {
        "arch": "arch",
        "gpu": "text",
        "profile": "name",
        **_BUCKET,
        "backend": "name",
        "tactic": "text",
        "layout": "name",
        "status": "choice status",
        "conditions": "json",
        "median_us": "real?",
        "launches": "int",
        "problems": "int",
        "fingerprint": "digest?",
        "default_backend": "name?",
    },
}
"""Table -> column -> kind; a ``?`` allows null. Tables are named as in the node's databases."""

WORDS = {
    "run status": frozenset(RUNS),
    "evidence status": frozenset(EVIDENCE),
    "verdict": frozenset(VERDICTS),
    "choice status": frozenset(CHOICES),
}
_HEX = frozenset("0123456789abcdef")


class Unfit(ValueError):
    """A row or a manifest that is not what a bundle holds; the message says why."""


def columns_of(table: str, rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Column -> values of rows that were read from JSON, every one of them checked.

    By column and not by row: a merge sees millions of rows. Raises Unfit.
    """
    kinds = TABLES[table]
    wanted = kinds.keys()
    for row in rows:
        if type(row) is not dict or row.keys() != wanted:
            raise Unfit(f"{table}: a row has not exactly the table's columns")
    out = {}
    for name, kind in kinds.items():
        values = [row[name] for row in rows]
        _check_values(kind, values, f"{table}.{name}")
        out[name] = values
    if "m_lo" in kinds and any(a > b for a, b in zip(out["m_lo"], out["m_hi"], strict=True)):
        raise Unfit(f"{table}: m_lo is above m_hi")
    return out


def fitting(table: str, rows: Sequence[Any]) -> tuple[list[Any], Counter[str]]:
    """Those rows that fit, and how often the others do not for which reason."""
    reasons: Counter[str] = Counter()
    try:
        columns_of(table, rows)
        return list(rows), reasons
    except Unfit:
        pass
    kept = []
    for row in rows:
        try:
            columns_of(table, [row])
            kept.append(row)
        except Unfit as error:
            reasons[str(error)] += 1
    return kept, reasons


def _check_values(kind: str, values: list[Any], where: str) -> None:
    if kind[-1] == "?":
        kind = kind[:-1]
        values = [v for v in values if v is not None]
    if not values:
        return
    types = set(map(type, values))
    if kind in ("int", "real"):
        allowed = {int} if kind == "int" else {int, float}
        # NaN compares false with everything, so it must be told from a number by itself.
        if not types <= allowed or not (min(values) >= 0 and max(values) <= _WHOLE):
            raise Unfit(f"{where}: not a number from 0 to 2^62")
        if kind == "real" and any(v != v for v in values):
            raise Unfit(f"{where}: not a number")
        return
    if types != {str}:
        raise Unfit(f"{where}: not text")
    for value in set(values):
        _FITS.get(kind, _word)(kind, value, where)


def _word(kind: str, value: str, where: str) -> None:
    if value not in WORDS[kind]:
        raise Unfit(f"{where}: {shown(value)} is no {kind}")


def _check_text(kind: str, value: str, where: str) -> None:
    if len(value) > TEXT or not value.isprintable():
        raise Unfit(f"{where}: longer than {TEXT} characters, or not printable")


def _check_name(kind: str, value: str, where: str) -> None:
    if not 0 < len(value) <= 200 or not value.isprintable():
        raise Unfit(f"{where}: {shown(value)} is not a name")


def _check_arch(kind: str, value: str, where: str) -> None:
    if not ARCH.fullmatch(value):
        raise Unfit(f"{where}: {shown(value)} is not an architecture")


def _check_digest(kind: str, value: str, where: str) -> None:
    if len(value) != 64 or not _HEX.issuperset(value):
        raise Unfit(f"{where}: {shown(value)} is not a SHA-256")


def _check_number(kind: str, value: str, where: str) -> None:
    if len(value) > 24 or not (value.isascii() and value.isdigit()):
        raise Unfit(f"{where}: {shown(value)} is not a whole number")


def _check_json(kind: str, value: str, where: str) -> None:
    if len(value) > JSON:
        raise Unfit(f"{where}: longer than {JSON} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unfit(f"{where}: half a character") from None
    parsed(value, where)


def _check_device(kind: str, value: str, where: str) -> None:
    _check_json(kind, value, where)
    device = parsed(value, where)
    if type(device) is not dict:
        raise Unfit(f"{where}: not an object")
    for name in ("uuid", "name", "gpu"):
        text = device.get(name)
        if text is not None and not (
            isinstance(text, str) and len(text) <= 200 and text.isprintable()
        ):
            raise Unfit(f"{where}: its {name} is not a short text")


_FITS: Mapping[str, Callable[[str, str, str], None]] = {
    "text": _check_text,
    "name": _check_name,
    "arch": _check_arch,
    "digest": _check_digest,
    "number": _check_number,
    "json": _check_json,
    "device": _check_device,
}


def parsed(text: str | bytes, where: str) -> Any:
    """`text` as JSON, without NaN, infinity or endless nesting. Raises Unfit."""
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError):
        raise Unfit(f"{where}: not JSON") from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def shown(value: object, most: int = 60) -> str:
    """A stranger's value in a sentence: short, and nothing a terminal would obey."""
    plain = value is None or isinstance(value, (str, int, float))
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= most else text[:most] + "..."


def json_schema() -> dict[str, Any]:
    """The published JSON schema: a manifest, and the rows of each table."""
    digest = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
    node = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
    optional = {"type": ["string", "null"]}
    plain: dict[str, dict[str, Any]] = {
        "int": {"type": "integer", "minimum": 0, "maximum": _WHOLE},
        "real": {"type": "number", "minimum": 0, "maximum": _WHOLE},
        "text": {"type": "string", "maxLength": TEXT},
        "name": {"type": "string", "minLength": 1, "maxLength": 200},
        "arch": {"type": "string", "pattern": f"^{ARCH.pattern}$"},
        "digest": digest,
        "number": {"type": "string", "pattern": "^[0-9]{1,24}$"},
        "json": {"type": "string", "maxLength": JSON, "contentMediaType": "application/json"},
        "device": {"type": "string", "maxLength": JSON, "contentMediaType": "application/json"},
        **{kind: {"type": "string", "enum": sorted(words)} for kind, words in WORDS.items()},
    }

    def column(kind: str) -> dict[str, Any]:
        found = plain[kind.removesuffix("?")]
        return {"anyOf": [found, {"type": "null"}]} if kind.endswith("?") else found

    def closed(properties: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": dict(properties),
            "required": list(properties),
            "additionalProperties": False,
        }

    rows = {
        table: closed({name: column(kind) for name, kind in kinds.items()})
        for table, kinds in TABLES.items()
    }
    file = closed({"bytes": plain["int"], "sha256": digest})
    counts = {"type": "object", "additionalProperties": plain["int"]}
    manifest = closed(
        {
            "format": {"const": FORMAT},
            "schema": {"const": VERSION},
            "fp4tune": plain["text"],
            "node": node,
            "hostname": optional,
            "created": plain["real"],
            "content": digest,
            "rows": {**counts, "propertyNames": {"enum": list(TABLES)}},
            "files": {"type": "object", "additionalProperties": file},
            "key": {"anyOf": [digest, {"type": "null"}]},
            "signature": {
                "anyOf": [{"type": "string", "pattern": "^[0-9a-f]{128}$"}, {"type": "null"}]
            },
        }
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{FORMAT}, version {VERSION}",
        "description": "manifest.json; $defs has the rows of <table>.ndjson, one a line",
        **manifest,
        "$defs": rows,
    }
