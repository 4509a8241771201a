"""The bundle: one zip file that carries a node's evidence and says itself what it is.

``manifest.json`` names every other member with its SHA-256. Each table is there twice, as
canonical NDJSON, which is the content, and as Parquet with the same columns, for tools; a merge
reads the NDJSON only, with Python's own parser. ``content`` is the SHA-256 of all NDJSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..cache.codec import canonical
from . import schema, signing
from .extras import need
from .schema import Unfit

MANIFEST = "manifest.json"
SUFFIX = ".fp4tune.zip"

MOST_PACKED = 64 << 20
"""Bytes a bundle may have; more is refused unread."""
MOST_UNPACKED = 256 << 20
"""Bytes its members may unpack to, together."""
MOST_MANIFEST = 1 << 20
MOST_ROWS = 1_000_000
PIECE = 5_000
"""Rows that are looked at together: bounds the memory that one bundle takes."""

_DATE = (1980, 1, 1, 0, 0, 0)
_NODE = re.compile(r"[0-9a-f]{32}")
_MEMBERS = {MANIFEST} | {f"{t}.{kind}" for t in schema.TABLES for kind in ("ndjson", "parquet")}
_EMPTY = hashlib.sha256(b"").hexdigest()

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


class Refusal(ValueError):
    """A bundle that does not verify; the message says why, in one clause."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose hashes and signature are right; `pieces` checks its rows as it reads them."""

    id: str
    """SHA-256 of the unsigned manifest: the same for the same export, whoever carries it."""
    node: str
    created: float
    fp4tune: str
    hostname: str | None
    content: str
    rows: Mapping[str, int]
    key: str | None
    ndjson: Mapping[str, bytes]

    def pieces(self, table: str) -> Iterator[dict[str, list[Any]]]:
        """Columns of up to PIECE rows at a time, checked. Raises Refusal."""
        data = self.ndjson.get(table, b"")
        try:
            count = 0
            for lines in _lines(data):
                # One parse for many lines: a list is what joins them.
                rows = schema.parsed(b"[" + b",".join(lines) + b"]", table)
                if len(rows) != len(lines):
                    raise Unfit(f"{table}: a line is not one row")
                count += len(rows)
                yield schema.columns_of(table, rows)
            if count != self.rows[table]:
                raise Unfit(f"{table}: {count} rows, the manifest says {self.rows[table]}")
        except Unfit as error:
            raise Refusal(str(error)) from None


def _lines(data: bytes) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for line in io.BytesIO(data):
        batch.append(line)
        if len(batch) == PIECE:
            yield batch
            batch = []
    if batch:
        yield batch


def pack(
    rows: Rows,
    node: str,
    created: float,
    hostname: str | None = None,
    key_file: Path | None = None,
    parquet: bool = True,
) -> tuple[str, bytes]:
    """A bundle of these rows: (its id, its bytes). The same arguments give the same bytes.

    Raises ValueError for rows the schema does not allow, Refused for a key that is none.
    """
    members: dict[str, bytes] = {}
    for table in schema.TABLES:
        plain = [dict(row) for row in rows.get(table, ())]
        lines = sorted(canonical(row) + "\n" for row in plain)
        members[f"{table}.ndjson"] = "".join(lines).encode()
        if parquet:
            members[f"{table}.parquet"] = _parquet(table, plain)
        else:
            schema.columns_of(table, plain)
    manifest: dict[str, Any] = {
        "format": schema.FORMAT,
        "schema": schema.VERSION,
        "fp4tune": __version__,
        "node": node,
        "hostname": hostname,
        "created": created,
        "content": _content(members),
        "rows": {table: len(rows.get(table, ())) for table in schema.TABLES},
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
        },
    }
    signed = signing.sign(manifest, key_file) if key_file else signing.unsigned(manifest)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        _add(file, MANIFEST, (json.dumps(signed, indent=1, sort_keys=True) + "\n").encode())
        for name, data in members.items():
            _add(file, name, data)
    return _id(signed), out.getvalue()


def _add(file: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name, _DATE)
    info.external_attr = 0o644 << 16
    packed = zipfile.ZIP_STORED if name.endswith(".parquet") else zipfile.ZIP_DEFLATED
    file.writestr(info, data, packed, 1 if packed else None)


def _parquet(table: str, rows: list[dict[str, Any]]) -> bytes:
    pa, pq = need("pyarrow"), need("pyarrow.parquet")
    made = pa.table(schema.columns_of(table, rows), schema=arrow_schema(table))
    out = io.BytesIO()
    # Small tables: dictionaries and statistics would take longer than the rows.
    plain = {"use_dictionary": False, "write_statistics": False, "store_schema": False}
    pq.write_table(made, out, compression="snappy", **plain)
    return out.getvalue()


def arrow_schema(table: str) -> Any:
    """The Arrow schema of a table's columns, as in its Parquet."""
    pa = need("pyarrow")
    types = {"int": pa.int64(), "real": pa.float64()}
    return pa.schema(
        [
            pa.field(name, types.get(kind.rstrip("?"), pa.string()), kind.endswith("?"))
            for name, kind in schema.TABLES[table].items()
        ]
    )


def unpack(data: bytes, trusted: Iterable[signing.Trusted] | None = None) -> Bundle:
    """Check a bundle's structure, hashes and signature. Raises Refusal.

    `trusted`: the keys one of which must have signed it; None for no such demand, but a
    signature that is there must be right either way. The rows are checked by `Bundle.pieces`.
    """
    if len(data) > MOST_PACKED:
        raise Refusal(f"it has more than {MOST_PACKED} bytes")
    try:
        members = _members(data)
        manifest = schema.parsed(members.pop(MANIFEST), MANIFEST)
        _check_manifest(manifest)
        _check_members(manifest, members)
        key = signing.check(manifest, trusted, manifest["node"])
    except (Unfit, signing.Untrusted) as error:
        raise Refusal(str(error)) from None
    return Bundle(
        _id(manifest),
        manifest["node"],
        float(manifest["created"]),
        manifest["fp4tune"],
        manifest["hostname"],
        manifest["content"],
        manifest["rows"],
        key,
        {n.removesuffix(".ndjson"): d for n, d in members.items() if n.endswith(".ndjson")},
    )


def named(data: bytes) -> str | None:
    """The id a bundle claims to have, read from its manifest alone; None where there is none.

    Good for one thing: a bundle that a store has need not be checked again.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if file.getinfo(MANIFEST).file_size > MOST_MANIFEST:
                return None
            manifest = schema.parsed(file.read(MANIFEST), MANIFEST)
            return _id(manifest) if type(manifest) is dict else None
    except Exception:  # whatever is wrong with it, `unpack` says so
        return None


def _members(data: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            infos = file.infolist()
            names = [info.filename for info in infos]
            if MANIFEST not in names:
                raise Unfit("it has no manifest.json")
            if len(set(names)) != len(names):
                raise Unfit("a member is there twice")
            if foreign := sorted(set(names) - _MEMBERS):
                raise Unfit(f"{schema.shown(foreign[0])} is no member of a bundle")
            if file.getinfo(MANIFEST).file_size > MOST_MANIFEST:
                raise Unfit(f"its manifest has more than {MOST_MANIFEST} bytes")
            if sum(info.file_size for info in infos) > MOST_UNPACKED:
                raise Unfit(f"it unpacks to more than {MOST_UNPACKED} bytes")
            for info in infos:
                if info.flag_bits & 1 or info.compress_type not in (
                    zipfile.ZIP_STORED,
                    zipfile.ZIP_DEFLATED,
                ):
                    raise Unfit("a member is encrypted, or packed in a way bundles are not")
            # Reading ends at the size declared, whatever the stream would unpack to.
            return {info.filename: file.read(info) for info in infos}
    except Unfit:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise Unfit("it is not a whole zip file") from None
    except (ValueError, NotImplementedError, OSError, RuntimeError, OverflowError) as error:
        raise Unfit(f"it cannot be unpacked: {schema.shown(str(error))}") from None


def _check_manifest(manifest: Any) -> None:
    if type(manifest) is not dict or manifest.get("format") != schema.FORMAT:
        raise Unfit("its manifest is not that of a bundle")
    version = manifest.get("schema")
    if type(version) is not int or version != schema.VERSION:
        raise Unfit(f"its schema is {schema.shown(version)}, this fp4tune reads {schema.VERSION}")
    wanted = {"format", "schema", "fp4tune", "node", "hostname", "created", "content", "rows"}
    if manifest.keys() != wanted | {"files", "key", "signature"}:
        raise Unfit("its manifest has not exactly the keys of its schema")
    if not isinstance(manifest["node"], str) or not _NODE.fullmatch(manifest["node"]):
        raise Unfit("its node id is not 32 hex digits")
    if type(manifest["created"]) not in (int, float) or not 0 <= manifest["created"] < 1e11:
        raise Unfit("its time of creation is none")
    for name in ("fp4tune", "hostname"):
        value = manifest[name]
        if not (value is None and name == "hostname") and not (
            isinstance(value, str) and len(value) <= 255 and value.isprintable()
        ):
            raise Unfit(f"its {name} is not a short text")
    rows = manifest["rows"]
    if type(rows) is not dict or rows.keys() != schema.TABLES.keys():
        raise Unfit("its manifest does not count the rows of every table")
    if any(type(n) is not int or not 0 <= n <= MOST_ROWS for n in rows.values()):
        raise Unfit(f"a table has more than {MOST_ROWS} rows, or no number of them")


def _check_members(manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
    files = manifest["files"]
    if type(files) is not dict or files.keys() != members.keys():
        raise Unfit("its members are not those its manifest names")
    for table in schema.TABLES:
        if f"{table}.ndjson" not in members:
            raise Unfit(f"{table}.ndjson is missing")
    for name, data in members.items():
        said = files[name]
        if type(said) is not dict or said.get("sha256") != hashlib.sha256(data).hexdigest():
            raise Unfit(f"{name} does not have the hash its manifest names")
        if said.get("bytes") != len(data):
            raise Unfit(f"{name} does not have the size its manifest names")
    if manifest["content"] != _content(members):
        raise Unfit("its content hash is wrong")


def _content(members: Mapping[str, bytes]) -> str:
    """SHA-256 over a line ``<table> <SHA-256 of its NDJSON>`` for each table, by name."""
    sha = hashlib.sha256()
    for table in sorted(schema.TABLES):
        data = members[f"{table}.ndjson"]
        digest = hashlib.sha256(data).hexdigest() if data else _EMPTY
        sha.update(f"{table} {digest}\n".encode())
    return sha.hexdigest()


def _id(manifest: Mapping[str, Any]) -> str:
    part = {name: value for name, value in manifest.items() if name != "signature"}
    return hashlib.sha256(canonical(part).encode()).hexdigest()
