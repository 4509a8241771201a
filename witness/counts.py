"""What processes that watch tell their node: one small JSON file each, in a drop box.

Anybody on the node may write there, so what is read is untrusted: of its size, of its kind, of
every number in it. It is shown, summed by who reported it, and used for nothing that loosens
anything: it narrows no bound, lifts no quarantine and makes no verdict ``safe``. Standard library
only.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from heapq import heappop, heappush
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from ..cache import dropbox, state
from ..machine import files

FOLDER = "witness"
"""The drop box's name in a state directory."""
VARIABLE = "FP4TUNE_WITNESS"
"""A drop box elsewhere, for engines that mount the state read-only."""
VERSION = 1
REGIME = "production"
"""Stands where a regime does in what an engine's own calls showed."""
_BYTES = 1 << 16
_FILES_OF_ONE = 64
_FILES = 4096
_LISTED = 4096
"""Files that are listed at a time, of whoever they are."""
_PASSES = 64
_MOST_CALLS = 512
MOST_FAULTS = 32
"""Faults, and suspicions that could not be confirmed, kept of one process."""
MOST_LEFT = 32
"""Sentences about what is not watched, told of one process."""
_TEXT = 200
_LARGEST = 1 << 62
COUNTED = ("rows", "skipped", "suspicions", "beyond", "faults", "suspected", "cleared", "launches")
"""rows judged; rows not looked at (their own activation was not finite, or they were elsewhere);
groups of rows that were suspicious, and that were too near overflow; suspicions that were confirmed
as faults, that could not be judged, and that were right after all; launches that were looked at or
might have been."""


@dataclass(frozen=True, slots=True)
class WatchedLayer:
    """What one process counted of one backend's tactic on layers of one shape."""

    backend: str
    tactic: str
    format: str
    activation: str
    out_dtype: str
    groups: int
    n: int
    k: int
    m_lo: int
    m_hi: int
    layers: int
    counts: Mapping[str, int]

    @property
    def key(self) -> tuple[Any, ...]:
        return (
            self.backend, self.tactic, self.format, self.activation, self.out_dtype, self.groups,
            self.n, self.k,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class WatchReport:
    """One process's file. `faults` are documents as `respond` makes them; `uid` is the file's
    owner, who is the one that reports, whatever the file says."""

    pid: int
    started: float
    at: float
    gpu: str
    arch: str
    uuid: str
    watched: tuple[WatchedLayer, ...]
    faults: tuple[Mapping[str, Any], ...] = ()
    unwatched: int = 0
    """Pairs of a layer and a kernel that are watched nowhere in that process."""
    left: tuple[str, ...] = ()
    """The first of what is watched nowhere, in words: these, and layers that are left alone."""
    uid: int = field(default=0, compare=False)

    @property
    def reporter(self) -> str:
        """Who counted: the user and the process."""
        return f"{self.uid}:{self.pid}@{self.started:.0f}"

    def total(self, what: str) -> int:
        return sum(each.counts[what] for each in self.watched)


def folder_of(state_dir: str | os.PathLike[str] | None) -> str | None:
    """Where a process of this node leaves its file: FP4TUNE_WITNESS, else the state's own box."""
    named = os.environ.get(VARIABLE)
    if named:
        return os.path.abspath(named)
    return None if state_dir is None else os.path.join(os.fspath(state_dir), FOLDER)


def write(report: WatchReport, folder: str) -> str:
    """Replace this process's file; returns its path. Raises OSError.

    The folder is made if it is missing, for everyone to write to and nobody to remove others'
    files from.
    """
    make_box(folder)
    name = f"{report.pid}-{report.started:.0f}.json"
    document = {"version": VERSION, **asdict(report)}
    del document["uid"]
    aside = os.path.join(folder, f".{name}.{os.urandom(4).hex()}")
    path = os.path.join(folder, name)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        try:
            files.write_all(fd, json.dumps(document).encode())
        finally:
            os.close(fd)
        os.rename(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    return path


class DropBox:
    """The reports in a drop box, gone through a little at a time: of each owner the newest 64 files
    count, and however many one leaves, another's are reached."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._entries: Iterator[os.DirEntry[str]] | None = None
        self._newest: dict[int, list[tuple[float, str]]] = {}
        """Of each owner, as heaps; those of the last whole pass, until the next has come as far."""
        self._coming: dict[int, list[tuple[float, str]]] = {}
        self._many: set[int] = set()

    def read(self) -> tuple[list[WatchReport], list[str]]:
        """The reports that are known after the next files, and a sentence for each file that is
        none. Never raises: a folder that is not there holds none."""
        self._look()
        found, ignored = [], []
        for owner in sorted(self._many):
            ignored.append(
                f"user {owner} has more than {_FILES_OF_ONE} files in {self.folder}: the newest "
                f"{_FILES_OF_ONE} are read"
            )
        for _, name in islice(self._by_turns(), _FILES):
            try:
                found.append(_read_report(os.path.join(self.folder, name)))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError) as error:
                ignored.append(f"{name} is ignored: {error}")
        return found, ignored

    @property
    def between(self) -> bool:
        """Whether a pass is going on that has not seen all files yet."""
        return self._entries is not None

    def _look(self) -> None:
        try:
            if self._entries is None:
                self._entries, self._coming = os.scandir(self.folder), {}
                self._many = set()
            for count, entry in enumerate(self._entries, 1):
                self._note(entry)
                if count >= _LISTED:
                    self._newest = {**self._newest, **self._coming}
                    return
            self._newest = self._coming
        except OSError:
            self._newest = {}
        self._entries = None

    def _note(self, entry: os.DirEntry[str]) -> None:
        if entry.name.startswith(".") or not entry.name.endswith(".json"):
            return
        try:
            about = entry.stat(follow_symlinks=False)
        except OSError:
            return
        theirs = self._coming.setdefault(about.st_uid, [])
        heappush(theirs, (about.st_mtime, entry.name))
        if len(theirs) > _FILES_OF_ONE:
            heappop(theirs)
            self._many.add(about.st_uid)

    def _by_turns(self) -> Iterator[tuple[float, str]]:
        """The newest file of each owner, then the next of each, and so on."""
        each = [sorted(theirs, reverse=True) for _, theirs in sorted(self._newest.items())]
        for row in zip_longest(*each):
            yield from (file for file in row if file is not None)


def read(folder: str | os.PathLike[str]) -> tuple[list[WatchReport], list[str]]:
    """Every report in a drop box, and a sentence for each file that is none; as `DropBox`."""
    box = DropBox(folder)
    found = box.read()
    for _ in range(_PASSES):
        if not box.between:
            break
        found = box.read()
    return found


def make_box(folder: str) -> None:
    """Make the drop box where it is missing, for everyone to write to and nobody to remove others'
    files from: whoever makes it owns it. Raises OSError."""
    if not os.path.isdir(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        state.make_folder(folder, dropbox.MODE)


def _read_report(path: str) -> WatchReport:
    fd = files.descriptor(path)
    try:
        about = os.fstat(fd)
        data = os.read(fd, _BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > _BYTES:
        raise ValueError(f"it has more than {_BYTES} bytes")
    return parse(data, about.st_uid)


def parse(data: bytes, uid: int) -> WatchReport:
    """A report from a file's bytes. Raises ValueError, one sentence."""
    try:
        given = json.loads(data)
        if given["version"] != VERSION:
            raise ValueError("it is of another version")
        watched = given["watched"]
        faults = given["faults"]
        if type(watched) is not list or len(watched) > _MOST_CALLS or type(faults) is not list:
            raise ValueError("it does not hold what a report does")
        return WatchReport(
            pid=_a_count(given["pid"]),
            started=_time(given["started"]),
            at=_time(given["at"]),
            gpu=_text(given["gpu"]),
            arch=_text(given["arch"]),
            uuid=_text(given["uuid"]),
            watched=tuple(_watched_layer(each) for each in watched),
            faults=tuple(_fault(each) for each in faults[:MOST_FAULTS]),
            unwatched=_a_count(given["unwatched"]),
            left=tuple(map(_text, given.get("left", ())[:MOST_LEFT])),
            uid=uid,
        )
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not a report of counts: {type(error).__name__}") from None


_SHAPE = ("groups", "n", "k", "m_lo", "m_hi", "layers")
_NAMES = ("backend", "tactic", "format", "activation", "out_dtype")
_FAULT = {
    **dict.fromkeys(("status", "layer", *_NAMES, "regime", "why"), "text"),
    **dict.fromkeys(("groups", "n", "k", "m", "row", "wrong"), "count"),
    "at": "time",
    "tile": "pair",
    "columns": "pair",
    "error": "number",
    "allowed": "number",
}


def _watched_layer(given: Mapping[str, Any]) -> WatchedLayer:
    counts = given["counts"]
    values: dict[str, Any] = {name: _text(given[name]) for name in _NAMES}
    values.update((name, _a_count(given[name])) for name in _SHAPE)
    return WatchedLayer(**values, counts={name: _a_count(counts[name]) for name in COUNTED})


def _fault(given: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {
        "text": _text,
        "count": _a_count,
        "time": _time,
        "pair": _two_counts,
        "number": _number,
    }
    return {name: kinds[kind](given[name]) for name, kind in _FAULT.items()}


def _text(value: object) -> str:
    if type(value) is not str or len(value) > _TEXT or not value.isprintable():
        raise ValueError("a name in it is none")
    return value


def _a_count(value: object) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError("a number in it is no count")
    return value


def _time(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e11:  # type: ignore[operator]
        raise ValueError("a time in it is none")
    return float(value)  # type: ignore[arg-type]


def _two_counts(value: object) -> list[int]:
    if type(value) is not list or len(value) != 2:
        raise ValueError("a range in it is none")
    return [_a_count(each) for each in value]


def _number(value: object) -> float | None:
    """A finite number; None stands for one that is not."""
    if value is None:
        return None
    if type(value) not in (int, float) or not -1e308 < value < 1e308:  # type: ignore[operator]
        raise ValueError("a number in it is none")
    return float(value)  # type: ignore[arg-type]


_KINDS: Mapping[str, Callable[[object], Any]] = {
    "text": _text,
    "count": _a_count,
    "time": _time,
    "pair": _two_counts,
    "number": _number,
}


def by_backend(reports: Iterable[WatchReport]) -> dict[tuple[str, str, str], dict[str, int]]:
    """(gpu, backend, reporter) to its counts."""
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for report in reports:
        for each in report.watched:
            own = found.setdefault(
                (report.gpu, each.backend, report.reporter), dict.fromkeys(COUNTED, 0)
            )
            for name, count in each.counts.items():
                own[name] += count
    return found


def forget_old(folder: str | os.PathLike[str], days: float = 7.0) -> None:
    """Remove the files of processes that have told nothing for so long, as far as one may; of a
    folder that is a drop box, and no link to another."""
    before = time.time() - 86400 * days
    with contextlib.suppress(OSError):
        fd = files.folder(folder)
        try:
            if os.fstat(fd).st_mode & 0o1002 != 0o1002:
                return
            for path in Path(files.within(fd)).iterdir():
                with contextlib.suppress(OSError):
                    if path.name.endswith(".json") and path.lstat().st_mtime < before:
                        path.unlink()
        finally:
            os.close(fd)


def merged(layers: Sequence[WatchedLayer]) -> tuple[WatchedLayer, ...]:
    """Layers of one shape and backend as one."""
    by_key: dict[tuple[Any, ...], list[WatchedLayer]] = {}
    for each in layers:
        by_key.setdefault(each.key, []).append(each)
    return tuple(
        replace(
            same[0],
            # A layer's calls outside of graphs are counted from before there are any, with m = 0.
            m_lo=min((each.m_lo for each in same if each.m_lo), default=0),
            m_hi=max(each.m_hi for each in same),
            layers=sum(each.layers for each in same),
            counts={name: sum(each.counts[name] for each in same) for name in COUNTED},
        )
        for same in by_key.values()
    )
