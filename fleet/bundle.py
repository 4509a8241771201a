"""The bundle: one zip file that carries a node's evidence and says itself what it is.

``manifest.json`` names every other member with its SHA-256. Each table is there twice, as
canonical NDJSON, which is the content, and as Parquet with the same columns, for tools; a merge
reads the NDJSON only, with Python's own parser. ``content`` is the SHA-256 of all NDJSON.

A bundle may come from anyone, so checking one takes a bounded amount of memory whatever is in it:
its packed bytes, and beside them one piece of one member at a time.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
MOST_DIRECTORY = 1 << 14
"""Bytes of the zip file's list of members: fifteen short names and what their writer adds."""
MOST_MANIFEST = 1 << 20
MOST_ROWS = 1_000_000
MOST_LINE = 1 << 20
"""Bytes of one row: three structured values of `schema.JSON` characters, and some more."""
PIECE = 5_000
PIECE_BYTES = 2 << 20
"""Rows, and bytes of them, that are parsed together."""
_READ = 1 << 16

_DATE = (1980, 1, 1, 0, 0, 0)
_NODE = re.compile(r"[0-9a-f]{32}")
_MEMBERS = {MANIFEST} | {f"{t}.{kind}" for t in schema.TABLES for kind in ("ndjson", "parquet")}

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
    data: bytes

    def pieces(self, table: str) -> Iterator[dict[str, list[Any]]]:
        """Columns of up to PIECE rows at a time, checked. Raises Refusal."""
        try:
            count = 0
            with _opened(self.data) as file:
                for lines in _line_chunks(
                    _member_pieces(file, file.getinfo(f"{table}.ndjson")), table
                ):
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


def _line_chunks(chunks: Iterable[bytes], table: str) -> Iterator[list[bytes]]:
    """Lines without their ends, as many as are parsed together. Raises Unfit for one too long."""
    batch: list[bytes] = []
    size, rest = 0, b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if len(line) > MOST_LINE:
                raise Unfit(f"{table}: a row has more than {MOST_LINE} bytes")
            batch.append(line)
            size += len(line)
            if len(batch) == PIECE or size > PIECE_BYTES:
                yield batch
                batch, size = [], 0
        if len(rest) > MOST_LINE:
            raise Unfit(f"{table}: a row has more than {MOST_LINE} bytes")
    if rest:
        batch.append(rest)
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
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    manifest: dict[str, Any] = {
        "format": schema.FORMAT,
        "schema": schema.VERSION,
        "fp4tune": __version__,
        "node": node,
        "hostname": hostname,
        "created": created,
        "content": _content(digests),
        "rows": {table: len(rows.get(table, ())) for table in schema.TABLES},
        "files": {
            name: {"bytes": len(data), "sha256": digests[name]} for name, data in members.items()
        },
    }
    signed = signing.sign(manifest, key_file) if key_file else signing.unsigned(manifest)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        _add_member(file, MANIFEST, (json.dumps(signed, indent=1, sort_keys=True) + "\n").encode())
        for name, data in members.items():
            _add_member(file, name, data)
    return _id(signed), out.getvalue()


def fits(data: bytes) -> bool:
    """Whether a bundle is as small as `unpack` wants it."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        unpacked = sum(info.file_size for info in file.infolist())
    return len(data) <= MOST_PACKED and unpacked <= MOST_UNPACKED


def _add_member(file: zipfile.ZipFile, name: str, data: bytes) -> None:
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
        with _opened(data) as file:
            manifest = schema.parsed(_manifest(file), MANIFEST)
            _check_manifest(manifest)
            _check_members(manifest, file)
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
        data,
    )


def named(data: bytes) -> str | None:
    """The id a bundle claims to have, read from its manifest alone; None where there is none.

    Good for one thing: a bundle that a store has need not be checked again.
    """
    try:
        with _opened(data) as file:
            manifest = schema.parsed(_manifest(file), MANIFEST)
            return _id(manifest) if type(manifest) is dict else None
    except Exception:  # whatever is wrong with it, `unpack` says so
        return None


@contextmanager
def _opened(data: bytes) -> Iterator[zipfile.ZipFile]:
    """The zip file, with the members a bundle may have. Raises Unfit, also for what goes wrong
    while it is read."""
    try:
        _check_directory(data)
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
            yield file
    except Unfit:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise Unfit("it is not a whole zip file") from None
    except (ValueError, NotImplementedError, RuntimeError, OSError, OverflowError, struct.error):
        raise Unfit("it cannot be unpacked") from None


def _check_directory(data: bytes) -> None:
    """Raises Unfit where the list of members is not short: it is read whole before anything else.

    A zip file ends in its end record (22 bytes without a comment), which says how long the list
    is; a ZIP64 locator before it would say so in another place.
    """
    end = data[-22:]
    if len(end) < 22 or end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise Unfit("it is not a whole zip file")
    if int.from_bytes(end[12:16], "little") > MOST_DIRECTORY or data[-42:-38] == b"PK\x06\x07":
        raise Unfit("it has more members than a bundle")


def _member_pieces(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """A member's bytes, a little at a time. Raises Unfit where they are not as many as the zip
    file declares, before more than that are read."""
    # Asked for one byte more than declared, zipfile shows whether there is more.
    wider = copy.copy(info)
    wider.file_size += 1
    left = info.file_size
    with file.open(wider) as stream:
        while chunk := stream.read(_READ):
            left -= len(chunk)
            if left < 0:
                raise Unfit(f"{info.filename} unpacks to more than it declares")
            yield chunk
    if left:
        raise Unfit(f"{info.filename} unpacks to less than it declares")


def _manifest(file: zipfile.ZipFile) -> bytes:
    return b"".join(_member_pieces(file, file.getinfo(MANIFEST)))


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


def _check_members(manifest: Mapping[str, Any], file: zipfile.ZipFile) -> None:
    files = manifest["files"]
    infos = {info.filename: info for info in file.infolist() if info.filename != MANIFEST}
    if type(files) is not dict or files.keys() != infos.keys():
        raise Unfit("its members are not those its manifest names")
    for said in files.values():
        if type(said) is not dict or said.keys() != {"bytes", "sha256"}:
            raise Unfit("its manifest has not exactly the keys of its schema")
    for table in schema.TABLES:
        if f"{table}.ndjson" not in infos:
            raise Unfit(f"{table}.ndjson is missing")
    digests = {}
    for name, info in infos.items():
        sha = hashlib.sha256()
        for chunk in _member_pieces(file, info):
            sha.update(chunk)
        digests[name] = sha.hexdigest()
        if files[name]["sha256"] != digests[name]:
            raise Unfit(f"{name} does not have the hash its manifest names")
        if type(files[name]["bytes"]) is not int or files[name]["bytes"] != info.file_size:
            raise Unfit(f"{name} does not have the size its manifest names")
    if manifest["content"] != _content(digests):
        raise Unfit("its content hash is wrong")


def _content(digests: Mapping[str, str]) -> str:
    """SHA-256 over a line ``<table> <SHA-256 of its NDJSON>`` for each table, by name."""
    sha = hashlib.sha256()
    for table in sorted(schema.TABLES):
        sha.update(f"{table} {digests[f'{table}.ndjson']}\n".encode())
    return sha.hexdigest()


def _id(manifest: Mapping[str, Any]) -> str:
    part = {name: value for name, value in manifest.items() if name != "signature"}
    return hashlib.sha256(canonical(part).encode()).hexdigest()
