"""Bundles that are made to exhaust whoever merges them."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator

import fleets

from fp4tune import __version__
from fp4tune.fleet import bundle, schema

MIB = 1 << 20


def manifest_of(members: dict[str, bytes], counts: dict[str, int] | None = None) -> dict:
    """A manifest that is right for `members`, hashes and all."""
    digests = {n: hashlib.sha256(d).hexdigest() for n, d in members.items()}
    return {
        "format": schema.FORMAT,
        "schema": schema.VERSION,
        "fp4tune": __version__,
        "node": fleets.node(9),
        "hostname": None,
        "created": 1e9,
        "content": fleets.content(members),
        "rows": {t: (counts or {}).get(t, 0) for t in schema.TABLES},
        "files": {n: {"bytes": len(d), "sha256": digests[n]} for n, d in members.items()},
        "key": None,
        "signature": None,
    }


def zipped(members: dict[str, bytes], manifest: dict | bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        file.writestr(bundle.MANIFEST, text)
        for name, data in members.items():
            file.writestr(name, data)
    return out.getvalue()


def with_table(table: str, data: bytes, rows: int = 0) -> bytes:
    members = {f"{t}.ndjson": b"" for t in schema.TABLES}
    members[f"{table}.ndjson"] = data
    return zipped(members, manifest_of(members, {table: rows}))


def runs_without_end(count: int) -> bytes:
    """Runs that differ in nothing but a long id."""
    (first, *_) = fleets.rows(1)["run"]
    before, _, after = json.dumps({**first, "id": "HERE"}).partition("HERE")
    return "".join(f"{before}{number:0200d}{after}\n" for number in range(count)).encode()


def declared(size: int) -> bytes:
    """A member that unpacks to far more than the zip file says of it."""
    members = {f"{t}.ndjson": b"" for t in schema.TABLES}
    raw = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = raw.compress(b"0" * size) + raw.flush()
    name = b"run.ndjson"
    files = manifest_of({**members, "run.ndjson": b"0" * 16})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(bundle.MANIFEST, json.dumps(files))
        for other in members:
            if other != name.decode():
                file.writestr(other, b"")
        at = out.tell()
        crc = zlib.crc32(b"0" * 16)
        head = struct.pack(
            "<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(packed), 16, len(name), 0
        )
        out.write(head + name + packed)
        info = zipfile.ZipInfo(name.decode())
        info.compress_type, info.CRC = zipfile.ZIP_DEFLATED, crc
        info.compress_size, info.file_size, info.header_offset = len(packed), 16, at
        file.filelist.append(info)
        file.NameToInfo[info.filename] = info
        file.start_dir = out.tell()
        file._didModify = True  # so that closing writes the list of members
    return out.getvalue()


def many_members(count: int) -> bytes:
    """One empty member, and a list that names it again and again."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("000000", b"")
    data = out.getvalue()
    at = data.index(b"PK\x01\x02")
    entry, end = data[at : data.index(b"PK\x05\x06")], data[data.index(b"PK\x05\x06") :]
    entries = b"".join(entry.replace(b"000000", b"%06d" % n) for n in range(count))
    sizes = struct.pack("<HHL", count & 0xFFFF, count & 0xFFFF, len(entries))
    return data[:at] + entries + end[:8] + sizes + end[16:]


def overlapping(count: int) -> bytes:
    """One packed stream that `count` members share: what a better bomb is made of."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("run.ndjson", b"0" * (30 * MIB))
        (first,) = file.filelist
        for number in range(count):
            info = zipfile.ZipInfo(f"{list(schema.TABLES)[number % 7]}.parquet")
            for name in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
                setattr(info, name, getattr(first, name))
            file.filelist.append(info)
    return out.getvalue()


def nested(depth: int) -> bytes:
    data = b"0" * MIB
    for _ in range(depth):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for number in range(4):
                file.writestr(f"{number}.zip", data)
        data = out.getvalue()
    return data


def honest(count: int) -> bytes:
    """Findings with details as long as they may be."""
    rows = fleets.rows(1, failures={(0, "fast"): 9})
    (first, *_) = rows["finding"]
    detail = json.dumps({"message": "\u00e9" * 10_000})
    rows["finding"] = [{**first, "id": n, "detail": detail} for n in range(count)]
    return bundle.pack(rows, fleets.node(1), 1e9, None, None, parquet=False)[1]


def attacks(mib: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Bundles to exhaust a merge, that unpack to about `mib` MiB: name and how it is made."""
    far = mib * MIB
    yield "one line of zeros", lambda: with_table("evidence", b"0" * far, 1)
    yield "line ends only", lambda: with_table("evidence", b"\n" * far, 1)
    yield "empty objects", lambda: with_table("evidence", b"{}\n" * (far // 3), 1_000_000)
    yield "lists in a line", lambda: with_table("run", b"[" + b"[]," * (far // 3) + b"0]\n", 1)
    yield "deep", lambda: with_table("run", b"[" * far, 1)
    yield "a huge number", lambda: with_table("run", b"9" * far, 1)
    yield "megabyte numbers", lambda: with_table("run", (b"9" * (MIB - 8) + b"\n") * mib, mib)
    yield (
        "strings of emoji",
        lambda: with_table("run", (b'"' + b"\xf0\x9f\x98\x80" * 200_000 + b'"\n') * mib, mib),
    )
    yield (
        "runs without end",
        lambda: with_table("run", runs_without_end(1000 * mib), 1000 * mib),
    )
    yield "declares less", lambda: declared(far)
    yield "many members", lambda: many_members(1600 * mib)
    yield "overlapping members", lambda: overlapping(300)
    yield "nested zips", lambda: nested(6)
    yield "a huge manifest", lambda: zipped({}, b'{"a":"' + b"0" * far + b'"}')
    yield (
        "manifest of keys",
        lambda: zipped({}, json.dumps({str(n): [] for n in range(70_000)}).encode()),
    )
