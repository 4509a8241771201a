"""Rows to columns and back: the bucket is flattened, structured fields are canonical JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import printable
from . import rows
from .errors import Undecodable
from .rows import BucketKey

BUCKET = tuple(f.name for f in dataclasses.fields(BucketKey))

_JSON = {"facts", "detail", "problem", "condition", "device", "versions", "bounds", "rows"}
_JSON_TUPLE = {"conditions", "reasons", "argv", "evidence"}
_WIDE = {"seed"}
"""Unsigned 64-bit numbers: SQLite's integers are signed, so these are stored as text."""

T = TypeVar("T")


def canonical(value: Any) -> str:
    """JSON with one spelling per value: sorted keys, no spaces, ASCII, no NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that it has no spelling for (NaN, infinity) as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value


@functools.cache
def names(kind: type) -> tuple[str, ...]:
    """The columns a row of this dataclass has, in the order of its fields."""
    found: list[str] = []
    for field in dataclasses.fields(kind):
        if field.name == "stamps":
            continue  # a table of their own
        found.extend(BUCKET if field.name == "bucket" else (field.name,))
    return tuple(found)


def columns(row: Any) -> dict[str, Any]:
    """Column -> value for SQLite. Raises ValueError for what JSON or a REAL cannot hold."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name == "stamps":
            continue
        if field.name == "bucket":
            out.update((name, getattr(value, name)) for name in BUCKET)
        else:
            out[field.name] = encode(field.name, value)
    return out


def encode(name: str, value: Any) -> Any:
    """One column's value as SQLite takes it."""
    if value is None:
        return None
    if name in _JSON:
        return canonical(value)
    if name in _JSON_TUPLE:
        return canonical(list(value))
    if name in _WIDE:
        return str(value)
    if isinstance(value, float) and not (value - value == 0):
        raise ValueError(f"{name} is {value}, which is not a finite number")
    return value


def decode(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass row that `columns` flattened; a `snapshot`'s rows, decoded already, too.

    Raises Undecodable, and nothing else, for values that no row has.
    """
    try:
        known: dict[str, Any] = {}
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            name = field.name
            if name == "bucket":
                known[name] = BucketKey(**{column: values[column] for column in BUCKET})
            elif name in values:
                known[name] = _decoded_value(name, values[name])
        return kind(**known)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        what = kind.__name__.lower()
        raise Undecodable(
            f"row {printable(values.get('id', ''), 40)} of {what}".replace("  ", " "),
            "this is stored in a way that fp4tune never writes",
        ) from error


def decodes(table: str, values: Mapping[str, Any]) -> bool:
    """Whether a row of a table of the ledger can be one."""
    kind = {each.__name__.lower(): each for each in _KINDS}.get(table)
    if kind is None:
        return True
    try:
        decode(kind, values)
    except Undecodable:
        return False
    return True


_KINDS = (
    rows.Environment,
    rows.Run,
    rows.Evidence,
    rows.Finding,
    rows.Timing,
    rows.Verdict,
    rows.Build,
    rows.Audit,
    rows.Probed,
    rows.Generation,
)


def _decoded_value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _JSON:
        return json.loads(value) if isinstance(value, str) else value
    if name in _JSON_TUPLE:
        return tuple(json.loads(value) if isinstance(value, str) else value)
    if name in _WIDE:
        return int(value)
    return value
