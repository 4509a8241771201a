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
from ..machine.processes import die_with_parent
from . import bundle, shard
from .places import Place
from .signing import Trusted

STORE = "store.json"
VERSION = 1
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
    for part in _parts(sources, into, have, trusted, jobs):
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
            return
        if place.isfile() or [n for n in place.names() if not n.startswith(".")]:
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
        found = json.loads(place.read(STORE))
        version = found["schema"] if found["format"] == "fp4tune-fleet-store" else None
    except FileNotFoundError:
        raise Refused(f"{place.url} is not a fleet store: it has no {STORE}") from None
    except OSError as error:
        raise Refused(f"the store {place.url} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError):
        version = None
    if version != VERSION:
        raise Refused(f"{place.url} is not a fleet store of schema {VERSION}")


def _parts(
    sources: Iterable[str],
    into: str,
    have: set[str],
    trusted: Sequence[Trusted] | None,
    jobs: int | None,
) -> Iterator[dict[str, Any]]:
    """What each chunk of sources came to; in processes where there is work for several."""
    files = _files(sources)
    cores = len(os.sched_getaffinity(0)) if jobs is None else max(1, jobs)
    chunks = _chunks(files)
    first = next(chunks, [])
    # A file system in this process's memory is not there in another's.
    alone = cores == 1 or len(first) < CHUNK or _in_memory(into) or any(map(_in_memory, first))
    if alone:
        for chunk in _before(first, chunks):
            yield take(chunk, into, have, trusted)
        return
    # Spawned, not forked: Arrow and fsspec have threads here.
    context = multiprocessing.get_context("spawn")
    given = have, os.getpid()
    with ProcessPoolExecutor(cores, mp_context=context, initializer=_start, initargs=given) as p:
        waiting: set[Future[dict[str, Any]]] = set()
        for chunk in _before(first, chunks):
            waiting.add(p.submit(_take, chunk, into, trusted))
            if len(waiting) > 2 * cores:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)


def _before(first: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield from rest


_have: set[str] = set()


def _start(have: set[str], parent: int) -> None:
    die_with_parent(parent)
    _have.update(have)


def _take(chunk: Sequence[str], into: str, trusted: Sequence[Trusted] | None) -> dict[str, Any]:
    return take(chunk, into, _have, trusted)


def take(
    sources: Sequence[str],
    into: str,
    have: set[str],
    trusted: Sequence[Trusted] | None = None,
) -> dict[str, Any]:
    """Check these files and write what verifies. ``taken``: (source, id, rows) of each that is in
    the store now; ``refused``: (source, reason)."""
    place = Place(into)
    open_shard = shard.Shard(place)
    taken: list[tuple[str, str, int]] = []
    refused: list[tuple[str, str]] = []
    mine: set[str] = set()
    for source in sources:
        try:
            data = _read(source)
            if have and (identity := bundle.named(data)) in have and identity:
                taken.append((source, identity, 0))
                continue
            found = bundle.unpack(data, trusted)
            if found.id not in mine:
                staged = shard.stage(found)
                open_shard.add(found, staged)
                mine.add(found.id)
            taken.append((source, found.id, sum(found.rows.values())))
        except bundle.Refusal as refusal:
            refused.append((source, str(refusal)))
        except OSError as error:
            refused.append((source, f"it cannot be read: {error.strerror or error}"))
        if open_shard.full:
            _close(open_shard)
    _close(open_shard)
    return {"taken": taken, "refused": refused}


def _close(open_shard: shard.Shard) -> None:
    try:
        open_shard.close()
    except OSError as error:
        raise Refused(f"the store {open_shard.place.url} cannot be written: {error}") from None


def add(data: bytes, into: str, trusted: Sequence[Trusted] | None = None) -> str:
    """Add one bundle that is in memory; returns its id. Raises Refusal and Refused."""
    place = Place(into)
    prepare(place)
    found = bundle.unpack(data, trusted)
    staged = shard.stage(found)
    if found.id not in set(shard.indexed(place)["bundle"]):
        open_shard = shard.Shard(place)
        open_shard.add(found, staged)
        _close(open_shard)
    return found.id


def _read(source: str) -> bytes:
    if "://" not in source:
        with open(source, "rb") as file:
            if os.fstat(file.fileno()).st_size > bundle.MOST_PACKED:
                raise bundle.Refusal(f"it has more than {bundle.MOST_PACKED} bytes")
            return file.read(bundle.MOST_PACKED + 1)
    place = Place(source)
    if place.size() > bundle.MOST_PACKED:
        raise bundle.Refusal(f"it has more than {bundle.MOST_PACKED} bytes")
    return place.read()


def _files(sources: Iterable[str]) -> Iterator[str]:
    """The files that `sources` name; a folder stands for every bundle directly in it."""
    for source in sources:
        if "://" not in source:
            if not os.path.isdir(source):
                if not os.path.exists(source):
                    raise Refused(f"there is no {source}")
                yield source
                continue
            names = sorted(os.listdir(source))
            yield from (os.path.join(source, n) for n in names if n.endswith(bundle.SUFFIX))
            continue
        place = Place(source)
        try:
            if not place.isdir():
                yield source
                continue
            names = place.names()
        except OSError as error:
            raise Refused(f"{source} cannot be read: {error}") from None
        for name in names:
            if name.endswith(bundle.SUFFIX):
                yield place.fs.unstrip_protocol(place.path(name))


def _in_memory(url: str) -> bool:
    return url.startswith("memory:")


def _chunks(files: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for name in files:
        chunk.append(name)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
