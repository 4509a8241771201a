"""The fleet store as DuckDB tables. What a query sees depends on the set of bundles alone.

Bundles of one node repeat what earlier ones said: a run is taken from the bundle that has the most
rows of it, then the newest, then the one whose id sorts last; choices from each node's newest
bundle. A bundle that two merges wrote is taken from one shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import Refused
from . import merge, schema, shard
from .extras import need
from .places import Place

MEMORY = "1GB"
"""What DuckDB may take; beyond, it spills to a temporary folder."""
FACTS = ("evidence", "finding", "timing", "verdict")
_ARCH = re.compile(f"arch={schema.ARCH.pattern}")


class Warehouse:
    """An open store. Use as a context; not for two threads at once."""

    def __init__(self, url: str, memory: str = MEMORY) -> None:
        """Raises Refused where `url` is no fleet store."""
        duckdb = need("duckdb")
        self.place = Place(url)
        merge.check_store(self.place)
        threads = len(os.sched_getaffinity(0))
        self.db = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": memory,
                "threads": threads,
                # Nothing is fetched or loaded because a file says so.
                "autoinstall_known_extensions": False,
                "preserve_insertion_order": False,
            },
        )
        if not self.place.local:
            self.db.register_filesystem(self.place.fs)
        try:
            self._views()
        except (duckdb.Error, OSError) as error:
            self.close()
            raise self._unreadable(error) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Warehouse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.db.close()

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """The answer to a query, a dictionary a row. Raises Refused where a file of the store is
        not what this program wrote."""
        with self._readable():
            cursor = self.db.execute(query, list(values))
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def run(self, statement: str) -> None:
        """A statement without an answer. Raises Refused, as `rows` does."""
        with self._readable():
            self.db.execute(statement)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (need("duckdb").Error, OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> Refused:
        return Refused(f"the store {self.place.url} cannot be read: {_first_line_of_error(error)}")

    def bundles(self) -> list[str]:
        """The ids of all bundles, sorted."""
        return [r["bundle"] for r in self.rows("SELECT bundle FROM bundle ORDER BY bundle")]

    def _views(self) -> None:
        index = [n for n in self.place.names(shard.INDEX) if n.endswith(".parquet")]
        shards = {name.removesuffix(".parquet") for name in index}
        self._table("raw_bundle", self._paths((shard.INDEX,), index), shard.INDEXED)
        self.db.execute(
            "CREATE TABLE bundle AS SELECT bundle, min(shard) AS shard, any_value(node) AS node, "
            "any_value(created) AS created, any_value(fp4tune) AS fp4tune, "
            "any_value(hostname) AS hostname, any_value(key) AS key, any_value(rows) AS rows "
            "FROM raw_bundle GROUP BY bundle"
        )
        kept = "SEMI JOIN bundle b ON r.bundle = b.bundle AND r.shard = b.shard"
        self._view("raw_run", "run", shards)
        self.db.execute(
            f"CREATE TABLE run AS SELECT r.*, c.created FROM (SELECT * FROM raw_run r {kept}) r "
            "JOIN bundle c ON r.bundle = c.bundle QUALIFY row_number() OVER "
            "(PARTITION BY r.node, r.id ORDER BY r.rows DESC, c.created DESC, r.bundle DESC) = 1"
        )
        for table in FACTS:
            self._view(f"raw_{table}", table, shards)
            # A run's rows come from the bundle and the shard that its own row was taken from.
            self.db.execute(
                f"CREATE VIEW {table} AS SELECT r.* FROM raw_{table} r SEMI JOIN run u "
                "ON r.bundle = u.bundle AND r.shard = u.shard AND r.run = u.id"
            )
        for table in ("environment", "choice"):
            self._view(f"raw_{table}", table, shards)
        self.db.execute(
            "CREATE TABLE newest AS SELECT bundle, shard, node, created FROM bundle "
            "QUALIFY row_number() OVER (PARTITION BY node ORDER BY created DESC, bundle DESC) = 1"
        )
        self.db.execute(
            "CREATE VIEW environment AS SELECT r.* FROM raw_environment r "
            f"{kept} QUALIFY row_number() OVER "
            "(PARTITION BY r.node, r.fingerprint ORDER BY r.bundle DESC) = 1"
        )
        self.db.execute(
            "CREATE VIEW choice AS SELECT r.* FROM raw_choice r SEMI JOIN newest w "
            "ON r.bundle = w.bundle AND r.shard = w.shard"
        )

    def _view(self, view: str, table: str, shards: set[str]) -> None:
        """A view of a table's files, of the shards that are in the index."""
        folders: list[tuple[str, ...]] = [(table,)]
        if table != "run":
            folders = [(table, name) for name in self._folders(table)]
        paths = [
            path
            for folder in folders
            for path in self._paths(folder, self.place.names(*folder))
            if path.rpartition("/")[2].removesuffix(".parquet") in shards
        ]
        columns = {
            field.name: {"int64": "BIGINT", "double": "DOUBLE"}.get(str(field.type), "VARCHAR")
            for field in shard.table_schema(table)
        }
        if table != "run":
            columns["arch"] = "VARCHAR"
        self._table(view, paths, columns)

    def _table(self, view: str, paths: list[str], columns: dict[str, str]) -> None:
        if not paths:
            types = {"string": "VARCHAR", "int64": "BIGINT", "float64": "DOUBLE"}
            empty = ", ".join(f"NULL::{types.get(k, k)} AS {n}" for n, k in columns.items())
            self.db.execute(f"CREATE VIEW {view} AS SELECT {empty} WHERE false")
            return
        listed = ", ".join("'" + path.replace("'", "''") + "'" for path in sorted(paths))
        self.db.execute(
            f"CREATE VIEW {view} AS SELECT * FROM read_parquet([{listed}], "
            "hive_partitioning = true, hive_types_autocast = false, union_by_name = true)"
        )

    def _folders(self, table: str) -> list[str]:
        return [name for name in self.place.folders(table) if _ARCH.fullmatch(name)]

    def _paths(self, folder: tuple[str, ...], names: list[str]) -> list[str]:
        paths = [self.place.path(*folder, n) for n in names if n.endswith(".parquet")]
        paths = [p for p in paths if not p.rpartition("/")[2].startswith(".")]
        if self.place.local:
            return paths
        return [self.place.fs.unstrip_protocol(path) for path in paths]


def _first_line_of_error(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
