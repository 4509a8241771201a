"""Writing bundles into a fleet store: many bundles to a shard, a Parquet file per table and arch.

    <store>/store.json                          what this is, and its version
    <store>/<table>/arch=<arch>/<shard>.parquet rows of the bundles of one shard
    <store>/run/<shard>.parquet
    <store>/bundle/<shard>.parquet              which bundles those are: written last

A shard is named by its bundles, so a merge that is repeated writes the same files again. What has
no file in ``bundle/`` is not part of the store: a merge that dies leaves nothing half-written. No
file is ever changed, so merges at the same time need no lock; where two bring one bundle, readers
take it from the shard whose name sorts first.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

from . import schema
from .bundle import Bundle, Refusal, arrow_schema
from .extras import need
from .places import Place

INDEX = "bundle"
ROWS = 400_000
"""Rows after which a shard is closed."""
_BATCH = 20_000
_ARCH = re.compile(r"[A-Za-z0-9_.]{1,40}")

_ORIGIN = {"bundle": "string", "node": "string"}
_DEVICE = {**_ORIGIN, "device": "string", "gpu": "string", "code": "string"}
ADDED: dict[str, dict[str, str]] = {
    "run": {**_ORIGIN, "device_id": "string", "gpu": "string", "rows": "int64"},
    "environment": {**_ORIGIN, "code": "string"},
    "evidence": {**_DEVICE, "bad_launches": "int64", "bad_problems": "int64"},
    "finding": _DEVICE,
    "timing": _DEVICE,
    "verdict": _DEVICE,
    "choice": _ORIGIN,
}
"""Columns that a store's tables have beside the bundle's: where a row comes from, the GPU it is
about (its UUID, or the node for a CPU) and its model, the code digest, and how much went wrong."""
INDEXED = {
    "bundle": "string",
    "node": "string",
    "created": "float64",
    "fp4tune": "string",
    "hostname": "string",
    "content": "string",
    "key": "string",
    "rows": "int64",
    "shard": "string",
}

Columns = dict[str, list[Any]]
Staged = list[tuple[str, str, Columns]]


def stage(bundle: Bundle) -> Staged:
    """A bundle's rows, checked and told where they come from: (table, arch, columns) each.

    Raises Refusal for rows that do not fit, or that name a run or environment it does not have.
    """
    environments: dict[str, tuple[str, str | None]] = {}
    runs: dict[str, tuple[str, str]] = {}
    out: Staged = []
    counts: dict[str, int] = {}
    for piece in bundle.pieces("environment"):
        for print_, arch, facts in zip(
            piece["fingerprint"], piece["arch"], piece["facts"], strict=True
        ):
            if not _ARCH.fullmatch(arch):
                raise Refusal(f"environment.arch: {schema.shown(arch)} is not an architecture")
            environments[print_] = arch, _code(facts)
        piece["code"] = [environments[print_][1] for print_ in piece["fingerprint"]]
        out += _by_arch("environment", piece, piece["arch"], bundle)
    for piece in bundle.pieces("run"):
        piece["device_id"], piece["gpu"] = [], []
        for run, device in zip(piece["id"], piece["device"], strict=True):
            found = _device(device, bundle.node)
            runs[run] = found
            piece["device_id"].append(found[0])
            piece["gpu"].append(found[1])
        out.append(("run", "", _told(piece, bundle)))
    for table in ("evidence", "finding", "timing", "verdict"):
        for piece in bundle.pieces(table):
            try:
                devices = [runs[run] for run in piece["run"]]
                places = [environments[print_] for print_ in piece["fingerprint"]]
            except KeyError as error:
                raise Refusal(
                    f"{table}: {schema.shown(error.args[0])} is no run or environment of it"
                ) from None
            for run in piece["run"]:
                counts[run] = counts.get(run, 0) + 1
            piece["device"] = [device for device, _ in devices]
            piece["gpu"] = [gpu for _, gpu in devices]
            piece["code"] = [code for _, code in places]
            if table == "evidence":
                _failures(piece)
            out += _by_arch(table, piece, [arch for arch, _ in places], bundle)
    for piece in bundle.pieces("choice"):
        if bad := [arch for arch in set(piece["arch"]) if not _ARCH.fullmatch(arch)]:
            raise Refusal(f"choice.arch: {schema.shown(bad[0])} is not an architecture")
        out += _by_arch("choice", piece, piece["arch"], bundle)
    for table, _, columns in out:
        if table == "run":
            columns["rows"] = [counts.get(run, 0) for run in columns["id"]]
    return out


def _by_arch(table: str, piece: Columns, archs: list[str], bundle: Bundle) -> Staged:
    told = _told(piece, bundle)
    kinds = set(archs)
    if len(kinds) == 1:
        return [(table, archs[0], told)]
    return [
        (
            table,
            kind,
            {
                name: [v for v, arch in zip(values, archs, strict=True) if arch == kind]
                for name, values in told.items()
            },
        )
        for kind in sorted(kinds)
    ]


def _told(piece: Columns, bundle: Bundle) -> Columns:
    count = len(next(iter(piece.values())))
    return {**piece, "bundle": [bundle.id] * count, "node": [bundle.node] * count}


def _device(text: str, node: str) -> tuple[str, str]:
    """(the GPU's UUID, or the node for what has none; the model)."""
    device = schema.parsed(text, "run.device")
    if type(device) is not dict:
        raise Refusal("run.device: not an object")
    uuid, name = device.get("uuid"), device.get("name") or device.get("gpu")
    for value in (uuid, name):
        if value is not None and not (
            isinstance(value, str) and len(value) <= 200 and value.isprintable()
        ):
            raise Refusal("run.device: its name or uuid is not a short text")
    return uuid or f"cpu-{node}", name or "unknown"


def _code(facts: str) -> str | None:
    found = schema.parsed(facts, "environment.facts")
    code = found.get("code") if type(found) is dict else None
    return code if isinstance(code, str) and len(code) <= 200 and code.isprintable() else None


def _failures(piece: Columns) -> None:
    """Failing launches and problems of each row of evidence; at least 1 where it failed."""
    piece["bad_launches"], piece["bad_problems"] = [], []
    for status, launches, problems, text in zip(
        piece["status"], piece["launches"], piece["problems"], piece["detail"], strict=True
    ):
        bad = (0, 0)
        if status == "failed":
            detail = schema.parsed(text, "evidence.detail")
            said = detail if type(detail) is dict else {}
            bad = (
                _count(said.get("bad_launches"), launches),
                _count(said.get("bad_problems"), problems),
            )
        piece["bad_launches"].append(bad[0])
        piece["bad_problems"].append(bad[1])


def _count(value: Any, most: int) -> int:
    """1 where a failure was not counted (a crash, a hang); never more than there were."""
    return max(1, min(value, most)) if type(value) is int else 1


def table_schema(table: str) -> Any:
    """The Arrow schema of a store's table, without `arch`, which is in the path."""
    pa = need("pyarrow")
    fields = [f.with_nullable(True) for f in arrow_schema(table) if f.name != "arch"]
    added = {**ADDED[table], "shard": "string"}
    return pa.schema(
        [*fields, *(pa.field(name, getattr(pa, kind)()) for name, kind in added.items())]
    )


class Shard:
    """Bundles on their way into a store. `add` as many as fit, then `close`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.rows = 0
        self._pa = need("pyarrow")
        self._index: list[dict[str, Any]] = []
        self._buffers: dict[tuple[str, str], Columns] = {}
        self._tables: dict[tuple[str, str], list[Any]] = {}

    @property
    def full(self) -> bool:
        return self.rows >= ROWS

    def add(self, bundle: Bundle, staged: Staged) -> None:
        """Take a bundle whose rows were staged."""
        for table, arch, columns in staged:
            buffer = self._buffers.setdefault((table, arch), {})
            for name, values in columns.items():
                buffer.setdefault(name, []).extend(values)
            if len(buffer["bundle"]) >= _BATCH:
                self._settle(table, arch)
        rows = sum(bundle.rows.values())
        self.rows += rows
        self._index.append(
            {
                "bundle": bundle.id,
                "node": bundle.node,
                "created": bundle.created,
                "fp4tune": bundle.fp4tune,
                "hostname": bundle.hostname,
                "content": bundle.content,
                "key": bundle.key,
                "rows": rows,
            }
        )

    def _settle(self, table: str, arch: str) -> None:
        """Python's values to Arrow's, which take a tenth of the memory."""
        buffer = self._buffers.pop((table, arch))
        wanted = table_schema(table)
        count = len(buffer["bundle"])
        arrays = [
            self._pa.array(buffer[f.name], f.type)
            if f.name in buffer
            else self._pa.nulls(count, f.type)
            for f in wanted
        ]
        made = self._pa.table(arrays, schema=wanted)
        self._tables.setdefault((table, arch), []).append(made)

    def close(self) -> str | None:
        """Write everything, the index last; returns the shard's name. Raises OSError."""
        if not self._index:
            return None
        for table, arch in list(self._buffers):
            self._settle(table, arch)
        ids = sorted(row["bundle"] for row in self._index)
        name = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:24]
        for (table, arch), parts in self._tables.items():
            made = self._pa.concat_tables(parts)
            at = made.schema.get_field_index("shard")
            column = self._pa.repeat(self._pa.scalar(name), made.num_rows)
            made = made.set_column(at, "shard", column)
            folder = (table, f"arch={arch}") if arch else (table,)
            self._write(made, *folder, f"{name}.parquet")
        schema_ = self._pa.schema(
            [(column, getattr(self._pa, kind)()) for column, kind in INDEXED.items()]
        )
        rows = [{**row, "shard": name} for row in self._index]
        self._write(self._pa.Table.from_pylist(rows, schema_), INDEX, f"{name}.parquet")
        self._index, self._tables, self.rows = [], {}, 0
        return name

    def _write(self, table: Any, *names: str) -> None:
        pq = need("pyarrow.parquet")
        out = io.BytesIO()
        pq.write_table(table, out, compression="zstd", row_group_size=100_000)
        self.place.write(out.getbuffer().tobytes(), *names)


def indexed(place: Place, columns: Iterable[str] = ("bundle",)) -> Mapping[str, list[Any]]:
    """These columns of the whole index, bundles that are in two shards twice."""
    pq = need("pyarrow.parquet")
    wanted = list(columns)
    out: dict[str, list[Any]] = {name: [] for name in wanted}
    for name in place.names(INDEX):
        if not name.endswith(".parquet") or name.startswith("."):
            continue
        data = io.BytesIO(place.read(INDEX, name))
        table = pq.read_table(data, columns=wanted, use_threads=False)
        for column in wanted:
            out[column] += table[column].to_pylist()
    return out
