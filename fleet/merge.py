"""Bundles into a fleet store: any number, in any order, as often as one likes.

A bundle enters whole or not at all. What the store says depends on nothing but the set of bundles
in it. Bundles are checked in as many processes as there are cores; each writes shards of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import Refused
from ..machine import files
from ..machine.processes import die_with_parent
from . import bundle, schema, shard
from .places import Place
from .signing import Trusted

STORE = "store.json"
VERSION = 1
_MOST_STORE = 1 << 16
CHUNK = 400
"""Bundles that one task checks and writes: what a shard holds unless its rows are many."""


@dataclass(slots=True)
class Merged:
    """What became of the bundles given."""

    store: str
    added: list[str] = field(default_factory=list)
    """Ids of the bundles that are new in the store."""
    known: int = 0
    """Bundles that the store had, or that were given twice."""
    refused: list[dict[str, str]] = field(default_factory=list)
    """``source`` and ``reason`` of each that does not verify."""
    rows: int = 0

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Into:
    """Where bundles go: a store, the bundles it has, and the keys one of which must have signed
    what is added, if any must."""

    store: str
    have: frozenset[str] | set[str] = frozenset()
    trusted: Sequence[Trusted] | None = None


def merge(
    sources: Iterable[str],
    into: str,
    trusted: Sequence[Trusted] | None = None,
    jobs: int | None = None,
) -> Merged:
    """Check every bundle among `sources` and add those that verify to the store `into`.

    A source is a file, a folder of bundles, or an fsspec URL of either. With `trusted` keys, only
    bundles that one of them signed are taken. `jobs` processes at most; default one a core.

    Raises Refused for a source or a store that cannot be used.
    """
    place = Place(into)
    prepare(place)
    have = set(shard.indexed(place)["bundle"])
    result = Merged(into)
    seen: set[str] = set()
    for part in _merged_chunks(sources, Into(into, have, trusted), jobs):
        for _, identity, rows in part["taken"]:
            if identity in seen or identity in have:
                result.known += 1
                continue
            seen.add(identity)
            result.rows += rows
            result.added.append(identity)
        result.refused += [{"source": s, "reason": why} for s, why in part["refused"]]
    result.refused.sort(key=lambda row: row["source"])
    result.added.sort()
    return result


def prepare(place: Place) -> None:
    """Make the store, or see that it is one this version can add to. Raises Refused."""
    try:
        if place.isfile(STORE):
            check_store(place)
            _tidy(place)
            return
        if place.isfile() or [n for n in place.names(all_kinds=True) if not n.startswith(".")]:
            if not place.isfile(STORE):
                raise Refused(f"{place.url} is not a fleet store, and not empty")
            check_store(place)  # another merge has made it since
            return
        text = json.dumps({"format": "fp4tune-fleet-store", "schema": VERSION}) + "\n"
        place.write(text.encode(), STORE)
    except OSError as error:
        raise Refused(f"the store {place.url} cannot be written: {error}") from None


def check_store(place: Place) -> None:
    """Raises Refused where this is no fleet store, or a newer fp4tune's."""
    try:
        found = json.loads(place.read(STORE, most=_MOST_STORE, links=True))
        version = found["schema"] if found["format"] == "fp4tune-fleet-store" else None
    except FileNotFoundError:
        raise Refused(f"{place.url} is not a fleet store: it has no {STORE}") from None
    except OSError as error:
        raise Refused(f"the store {place.url} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    if type(version) is not int or version != VERSION:
        raise Refused(f"{place.url} is not a fleet store of schema {VERSION}")


def _tidy(place: Place) -> None:
    for table in (*schema.TABLES, shard.INDEX):
        for folder in ((table,), *((table, name) for name in place.folders(table))):
            place.tidy(*folder)


def _merged_chunks(
    sources: Iterable[str], into: Into, jobs: int | None
) -> Iterator[dict[str, Any]]:
    """What each chunk of sources came to; in processes where there is work for several."""
    files = _bundle_files(sources)
    cores = len(os.sched_getaffinity(0)) if jobs is None else max(1, jobs)
    chunks = _chunks(files)
    first = next(chunks, [])
    # A file system in this process's memory is not there in another's.
    urls = (into.store, *(source.path for source in first))
    alone = cores == 1 or len(first) < CHUNK or any(map(_in_memory, urls))
    if alone:
        for chunk in _before(first, chunks):
            yield take(chunk, into)
        return
    # Spawned, not forked: Arrow and fsspec have threads here.
    context = multiprocessing.get_context("spawn")
    start = (os.getpid(), into)
    with ProcessPoolExecutor(
        cores, mp_context=context, initializer=_start_process, initargs=start
    ) as p:
        waiting: set[Future[dict[str, Any]]] = set()
        for chunk in _before(first, chunks):
            waiting.add(p.submit(_take, chunk))
            if len(waiting) > 2 * cores:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)


def _before(first: list[Source], rest: Iterator[list[Source]]) -> Iterator[list[Source]]:
    yield first
    yield from rest


_into: list[Into] = []
"""Where a worker process puts what it takes: one, set when it starts."""


def _start_process(parent: int, into: Into) -> None:
    die_with_parent(parent)
    _into[:] = [into]


def _take(chunk: Sequence[Source]) -> dict[str, Any]:
    return take(chunk, _into[0])


def take(sources: Sequence[Source], into: Into) -> dict[str, Any]:
    """Check these files and write what verifies. ``taken``: (source, id, rows) of each that is in
    the store now; ``refused``: (source, reason)."""
    open_shard = shard.Shard(Place(into.store))
    taken: list[tuple[str, str, int]] = []
    refused: list[tuple[str, str]] = []
    mine: set[str] = set()
    for source in sources:
        try:
            data = source.read()
        except (files.Irregular, bundle.Refusal) as error:
            refused.append((source.path, str(error)))
            continue
        except OSError as error:
            refused.append((source.path, f"it cannot be read: {error.strerror or error}"))
            continue
        try:
            if into.have and (identity := bundle.named(data)) in into.have and identity:
                taken.append((source.path, identity, 0))
                continue
            found = bundle.unpack(data, into.trusted)
            if found.id not in mine:
                open_shard.add(found)
                mine.add(found.id)
            taken.append((source.path, found.id, sum(found.rows.values())))
        except bundle.Refusal as refusal:
            refused.append((source.path, str(refusal)))
        except OSError as error:
            raise _cannot_write(open_shard.place, error) from None
        if open_shard.full:
            _close(open_shard)
    _close(open_shard)
    return {"taken": taken, "refused": refused}


def _close(open_shard: shard.Shard) -> None:
    try:
        open_shard.close()
    except OSError as error:
        raise _cannot_write(open_shard.place, error) from None


def _cannot_write(place: Place, error: OSError) -> Refused:
    return Refused(f"the store {place.url} cannot be written: {error}")


def add(data: bytes, into: str, trusted: Sequence[Trusted] | None = None) -> str:
    """Add one bundle that is in memory; returns its id. Raises Refusal and Refused."""
    place = Place(into)
    prepare(place)
    found = bundle.unpack(data, trusted)
    open_shard = shard.Shard(place)
    try:
        open_shard.add(found)
    except OSError as error:
        raise _cannot_write(place, error) from None
    if found.id not in set(shard.indexed(place)["bundle"]):
        _close(open_shard)
    return found.id


@dataclass(frozen=True, slots=True)
class Source:
    """A file that may be a bundle. `named`: by whoever asked for the merge, who may mean a link;
    what merely lies in a folder may be one of anybody's."""

    path: str
    named: bool

    def read(self) -> bytes:
        """Raises Irregular, and OSError."""
        if "://" not in self.path:
            return files.whole(self.path, bundle.MOST_PACKED, self.named)
        return Place(self.path).read(most=bundle.MOST_PACKED, links=self.named)


def _bundle_files(sources: Iterable[str]) -> Iterator[Source]:
    """The files that `sources` name; a folder stands for every bundle directly in it."""
    for source in sources:
        if "://" not in source:
            if not os.path.isdir(source):
                if not os.path.lexists(source):
                    raise Refused(f"there is no {source}")
                yield Source(source, True)
                continue
            try:
                names = sorted(os.listdir(source))
            except OSError as error:
                raise Refused(f"{source} cannot be read: {error.strerror}") from None
            for name in names:
                if name.endswith(bundle.SUFFIX):
                    yield Source(os.path.join(source, name), False)
            continue
        place = Place(source)
        try:
            if not place.isdir():
                yield Source(source, True)
                continue
            names = place.names(all_kinds=True)
        except OSError as error:
            raise Refused(f"{source} cannot be read: {error}") from None
        for name in names:
            if name.endswith(bundle.SUFFIX):
                yield Source(place.fs.unstrip_protocol(place.path(name)), False)


def _in_memory(url: str) -> bool:
    return url.startswith("memory:")


def _chunks(files: Iterable[Source]) -> Iterator[list[Source]]:
    chunk: list[Source] = []
    for source in files:
        chunk.append(source)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
