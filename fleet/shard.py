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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from . import schema
from .bundle import Bundle, Refusal, arrow_schema
from .extras import need
from .pile import Pile
from .places import Place

INDEX = "bundle"
ROWS = 400_000
BYTES = 96 << 20
"""Rows, and bytes of them, after which a shard is closed."""
_GROUP_ROWS = 50_000
_GROUP_BYTES = 8 << 20
"""Rows, and bytes of them, that are written to a file together."""

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
Staged = Iterator[tuple[str, str, Columns]]
_JUDGED = ("evidence", "finding", "timing", "verdict")


def staged(bundle: Bundle) -> Staged:
    """A bundle's rows, checked and told where they come from: (table, arch, columns), piece by
    piece. They count only if all of them come.

    Raises Refusal for rows that do not fit, or that name a run or environment it does not have.
    """
    environments: dict[str, tuple[str, str | None]] = {}
    for piece in bundle.pieces("environment"):
        for print_, arch, facts in zip(
            piece["fingerprint"], piece["arch"], piece["facts"], strict=True
        ):
            environments[print_] = arch, _code_digest(facts)
        if len(environments) > schema.MOST_FEW:
            raise Refusal(f"it has more than {schema.MOST_FEW} environments")
        piece["code"] = [environments[print_][1] for print_ in piece["fingerprint"]]
        yield from _by_arch("environment", piece, piece["arch"], bundle)
    runs: dict[str, tuple[str, str]] = {}
    for piece in bundle.pieces("run"):
        for run, device in zip(piece["id"], piece["device"], strict=True):
            runs[run] = _device_id(device, bundle.node)
        if len(runs) > schema.MOST_FEW:
            raise Refusal(f"it has more than {schema.MOST_FEW} runs")
    counts = dict.fromkeys(runs, 0)
    for table in _JUDGED:
        for piece in bundle.pieces(table):
            try:
                devices = [runs[run] for run in piece["run"]]
                places = [environments[print_] for print_ in piece["fingerprint"]]
            except KeyError as error:
                raise Refusal(
                    f"{table}: {schema.shown(error.args[0])} is no run or environment of it"
                ) from None
            for run in piece["run"]:
                counts[run] += 1
            piece["device"] = [device for device, _ in devices]
            piece["gpu"] = [gpu for _, gpu in devices]
            piece["code"] = [code for _, code in places]
            if table == "evidence":
                _failures(piece)
            yield from _by_arch(table, piece, [arch for arch, _ in places], bundle)
    # Once more, now that the rows of each are known: there are few of them.
    for piece in bundle.pieces("run"):
        piece["device_id"] = [runs[run][0] for run in piece["id"]]
        piece["gpu"] = [runs[run][1] for run in piece["id"]]
        piece["rows"] = [counts[run] for run in piece["id"]]
        yield "run", "", _with_origin(piece, bundle)
    for piece in bundle.pieces("choice"):
        yield from _by_arch("choice", piece, piece["arch"], bundle)


def _by_arch(table: str, piece: Columns, archs: list[str], bundle: Bundle) -> Staged:
    told = _with_origin(piece, bundle)
    kinds = set(archs)
    if len(kinds) == 1:
        yield table, archs[0], told
        return
    for kind in sorted(kinds):
        part = {
            name: [v for v, arch in zip(values, archs, strict=True) if arch == kind]
            for name, values in told.items()
        }
        yield table, kind, part


def _with_origin(piece: Columns, bundle: Bundle) -> Columns:
    count = len(next(iter(piece.values())))
    return {**piece, "bundle": [bundle.id] * count, "node": [bundle.node] * count}


def _device_id(text: str, node: str) -> tuple[str, str]:
    """(the GPU's UUID, or the node for what has none; the model)."""
    device = schema.parsed(text, "run.device")
    return device.get("uuid") or f"cpu-{node}", device.get("name") or device.get("gpu") or "unknown"


def _code_digest(facts: str) -> str | None:
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
                _failures_at_most(said.get("bad_launches"), launches),
                _failures_at_most(said.get("bad_problems"), problems),
            )
        piece["bad_launches"].append(bad[0])
        piece["bad_problems"].append(bad[1])


def _failures_at_most(value: Any, most: int) -> int:
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
    """Bundles on their way into a store. `add` as many as fit, then `close`.

    Rows wait in a `Pile`, most of it on the disk, and are written from there a little at a time.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.rows = 0
        self._pa = need("pyarrow")
        self._index: list[dict[str, Any]] = []
        self._pile = Pile()
        self._schemas = {
            table: (made := table_schema(table)).remove(made.get_field_index("shard"))
            for table in schema.TABLES
        }

    @property
    def full(self) -> bool:
        return self.rows >= ROWS or self._pile.bytes >= BYTES

    def add(self, bundle: Bundle) -> None:
        """Take a bundle, whole or not at all. Raises Refusal, and OSError."""
        mark = self._pile.mark()
        try:
            for table, arch, columns in staged(bundle):
                self._pile.put((table, arch), self._batch(table, columns))
        except BaseException:
            self._pile.back_to(mark)
            raise
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

    def _batch(self, table: str, columns: Columns) -> Any:
        wanted = self._schemas[table]
        arrays = [self._pa.array(columns[field.name], field.type) for field in wanted]
        return self._pa.RecordBatch.from_arrays(arrays, schema=wanted)

    def close(self) -> str | None:
        """Write everything, the index last; returns the shard's name. Raises OSError."""
        if not self._index:
            return None
        ids = sorted(row["bundle"] for row in self._index)
        name = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:24]
        for table, arch in self._pile.filled():
            folder = (table, f"arch={arch}") if arch else (table,)
            self._write(self._groups(table, arch, name), *folder, f"{name}.parquet")
        rows = [{**row, "shard": name} for row in self._index]
        index = self._pa.schema([(n, getattr(self._pa, kind)()) for n, kind in INDEXED.items()])
        made = self._pa.Table.from_pylist(rows, index)
        self._write(iter([made]), INDEX, f"{name}.parquet")
        self._index, self.rows = [], 0
        self._pile.close()
        self._pile = Pile()
        return name

    def _groups(self, table: str, arch: str, shard: str) -> Iterator[Any]:
        """A table's rows, as many at a time as are written together."""
        waiting: list[Any] = []
        for batch in self._pile.batches((table, arch), self._schemas[table]):
            waiting.append(batch)
            rows, size = sum(b.num_rows for b in waiting), sum(b.nbytes for b in waiting)
            if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
                yield self._named(waiting, shard)
                waiting = []
        if waiting:
            yield self._named(waiting, shard)

    def _named(self, batches: list[Any], shard: str) -> Any:
        made = self._pa.Table.from_batches(batches).combine_chunks()
        column = self._pa.repeat(self._pa.scalar(shard), made.num_rows)
        return made.append_column("shard", column)

    def _write(self, groups: Iterator[Any], *names: str) -> None:
        pq = need("pyarrow.parquet")
        first = next(groups)
        with (
            self.place.writing(*names) as file,
            pq.ParquetWriter(file, first.schema, compression="zstd") as writer,
        ):
            writer.write_table(first)
            for group in groups:
                writer.write_table(group)


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
