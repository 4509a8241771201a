"""How an engine reads the choice: a dictionary look-up that never raises.

``open()`` loads choices.db once; `Reader.choose` then takes under a microsecond and touches no
file, except that once a second a reader asks the file system whether something was quarantined,
and an unpinned one whether a newer generation is there. What no evidence covers is answered with
status ``unproven`` and the fallback ``torch-dequant``; what rests on a file that has changed since
with ``stale``, and what failed in production with its successor, or ``quarantined`` without one.
Standard library only, quick to import.

Shared between threads freely; a process that forks may go on using its reader on both sides.
"""

from __future__ import annotations

import os
import time
from _thread import allocate_lock
from _weakref import ref

from ..errors import printable
from . import quarantine, quarantine_store, snapshot, state
from .decision import FALLBACK, Decision
from .errors import Corrupt, Foreign, Missing, NewerSchema, StateError, translate
from .view import View

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .quarantine import Quarantine

__all__ = ["FALLBACK", "Decision", "Reader", "choose", "open", "pin", "report_fault"]

INTERVAL = 1.0
"""Seconds between two looks at the file."""
RETRY = 30.0
"""Seconds after which quarantines that could not be read are looked at again."""
_NEVER = float("inf")
VARIABLE = "FP4TUNE_GENERATION"
"""The generation that readers pin, so that all ranks of a start have the same."""

_monotonic = time.monotonic


class Reader:
    """A loaded choices.db. Made by `open`.

    `generation` is 0 while nothing could be loaded; `problem` is the last StateError met in
    loading, None after a success. `pinned` readers keep their generation for good; quarantines
    reach them all the same.
    """

    def __init__(
        self,
        path: str | None = None,
        pin: bool = False,
        arch: str | None = None,
        gpu: str | None = None,
        profile: str | None = None,
    ) -> None:
        self.path = path
        self.pinned = pin
        self.problem: StateError | None = None
        self._defaults = (arch, gpu, profile)
        self._view = View(None, *self._defaults)
        self._seen: tuple[int, int, int] | None = None
        self._stored: object = None
        self._retry = _NEVER
        self._shared: list[Quarantine] = []
        self._due = 0.0
        self._lock = allocate_lock()
        _readers[:] = [one for one in _readers if one() is not None]
        _readers.append(ref(self))

    @property
    def generation(self) -> int:
        return self._view.generation

    @property
    def meta(self) -> dict[str, Any]:
        """What the publication says of itself: generation, digest, published, run and more."""
        return self._view.meta

    def choose(
        self,
        m: int,
        n: int,
        k: int,
        format: str = "nvfp4",
        activation: str = "bf16",
        out_dtype: str = "bf16",
        groups: int = 1,
        arch: str | None = None,
        layout: str | None = None,
    ) -> Decision:
        """The backend for one GEMM. Never raises, whatever it is given.

        With `layout`, the best proven one for weights already prepared so. Without `arch`, the
        one the reader was opened for, or the only one the file has.
        """
        if _monotonic() >= self._due:
            self.refresh()
        view = self._view
        try:
            return view.answers[m, n, k, format, activation, out_dtype, groups, arch, layout]
        except Exception:
            pass
        try:
            return view.find((m, n, k, format, activation, out_dtype, groups, arch, layout))
        except Exception:
            # Whatever was wrong with the question, the answer is the same: not proven.
            return view.unproven if arch is None else view.nothing(arch)

    def alternatives(
        self,
        m: int,
        n: int,
        k: int,
        format: str = "nvfp4",
        activation: str = "bf16",
        out_dtype: str = "bf16",
        groups: int = 1,
        arch: str | None = None,
    ) -> tuple[Decision, ...]:
        """Every candidate that may be chosen here, best first, quarantined ones left out.

        Empty where nothing is known. Never raises."""
        if _monotonic() >= self._due:
            self.refresh()
        try:
            layer = self._view.layer(arch, (format, activation, out_dtype, groups, n, k))
            at = layer.at(m) if layer else None
            if layer is not None and at is not None:
                return tuple(one for one, _, entry in layer.ranked[at] if entry is None)
        except Exception:
            pass
        return ()

    def layout(
        self,
        n: int,
        k: int,
        format: str = "nvfp4",
        activation: str = "bf16",
        out_dtype: str = "bf16",
        groups: int = 1,
        arch: str | None = None,
    ) -> str | None:
        """The weight layout to prepare this layer in, or None where none was chosen."""
        try:
            layer = self._view.layer(arch, (format, activation, out_dtype, groups, n, k))
            return layer.layout if layer else None
        except Exception:
            return None

    @property
    def quarantines(self) -> tuple[Quarantine, ...]:
        """What is quarantined, as this reader knows it."""
        return self._view.quarantines

    def rows(self, table: str) -> list[dict[str, Any]]:
        """The rows of one table of the generation in use, for reports."""
        return self._view.rows(table)

    def scope(self) -> tuple[str, str, str] | None:
        """(arch, gpu, profile) that questions without `arch` are answered for; None where several
        fit, or none."""
        return self._view.scope()

    def refresh(self) -> None:
        """Load a newer generation if there is one; keep the old one if that fails. Never raises.

        One thread does it, the others go on with what they have.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._due = _monotonic() + INTERVAL
            if not (self.pinned and self.generation):
                path = self.path or _find()
                stamp = state.file_stamp(path) if path else None
                if path and stamp and stamp != self._seen:
                    self._load(path, stamp)
            self._look_at_quarantines()
        except StateError as error:
            self.problem = error
        except Exception as error:
            self.problem = translate(error, self.path or "choices.db")
        finally:
            self._lock.release()

    def _load(self, path: str, stamp: tuple[int, int, int] | None) -> None:
        try:
            loaded = snapshot.load_pages(path)
            view = View(loaded, *self._defaults, self._quarantined())
        except (Corrupt, Foreign, NewerSchema):
            self._seen = stamp  # reading the same file again would not help
            raise
        self.path = path
        self._view = view
        self._seen = stamp
        self.problem = None

    def _look_at_quarantines(self) -> None:
        store = self.store()
        stamp = quarantine_store.stamp(store)
        if stamp != self._stored or _monotonic() >= self._retry:
            self._shared, ignored = quarantine_store.read(store)
            self._apply()
            # Where some could not be read: what went wrong may be over in a while.
            known = all(q.scope != quarantine.EVERYTHING for q in self._shared)
            self._retry = _NEVER if known else _monotonic() + RETRY
            self._stored = stamp
            for sentence in ignored:
                _warn(sentence)

    def _apply(self) -> None:
        """Answer by the quarantines there are now; the next call of `choose` knows them."""
        now = self._quarantined()
        if now != self._view.quarantines:
            self._view = View(self._view.loaded, *self._defaults, now)

    def _learn(self) -> None:
        """`_apply` at once, from whatever thread."""
        # Not for ever: it may be this very thread that was interrupted while it held the lock.
        if self._lock.acquire(timeout=1.0):
            try:
                self._apply()
            finally:
                self._lock.release()
        else:
            self._apply()

    def _quarantined(self) -> tuple[Quarantine, ...]:
        return tuple({q.id: q for q in (*self._shared, *_own)}.values())

    def store(self) -> str | None:
        """The folder this reader learns quarantines from."""
        place = os.path.dirname(os.path.abspath(self.path)) if self.path else None
        return quarantine_store.place(place) if place is not None else None


def open(
    path: str | os.PathLike[str] | None = None,
    *,
    pin: bool = False,
    generation: int | None = None,
    arch: str | None = None,
    gpu: str | None = None,
    profile: str | None = None,
) -> Reader:
    """Load choices.db: `path` (the file or its directory), else the first place that holds one.

    `pin` keeps this generation whatever is published later: an engine's ranks must agree.
    `generation` says which, and pins it; a pinned reader takes it from FP4TUNE_GENERATION where
    that is set. `arch` (``sm90``, ``cpu``), `gpu` (the model's name) and `profile` say whose
    choices to answer with where the file has several. Raises StateError, one sentence: Missing,
    Corrupt, Foreign, NewerSchema.
    """
    place = _file(path) if path is not None else _find()
    if place is None:
        raise state.nothing_published()
    if pin and generation is None:
        generation = _named_generation()
    reader = Reader(place, pin or generation is not None, arch, gpu, profile)
    reader._load(place, state.file_stamp(place))
    if generation is not None and reader.generation != generation:
        kept = state.generation_file(os.path.dirname(place) or ".", generation)
        if not os.path.exists(kept):
            raise Missing(
                kept, f"generation {generation} is not kept here; {reader.generation} is published"
            )
        reader._load(kept, state.file_stamp(kept))
    reader._look_at_quarantines()
    reader._due = _monotonic() + INTERVAL
    return reader


def pin(
    path: str | os.PathLike[str] | None = None, *, generation: int | None = None, **scope: str
) -> Reader:
    """`open`, pinned, for the first process of an engine: every process it starts gets the same.

    It leaves the number in FP4TUNE_GENERATION, which child processes inherit. Raises as `open`.
    """
    reader = open(path, pin=True, generation=generation, **scope)
    os.environ[VARIABLE] = str(reader.generation)
    return reader


def _named_generation() -> int | None:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise Missing("choices.db", f"{VARIABLE} is {text[:40]!r}, which is no generation")
    return int(text)


class Reported:
    """What became of a reported fault: the `quarantine`, and the file it is `shared` through: one
    of the store, or one in a drop box, from which the daemon takes it up.

    `shared` is None where neither could be written: then only this process knows, and forgets it
    when it ends.
    """

    __slots__ = ("quarantine", "shared")

    def __init__(self, entry: Quarantine, shared: str | None) -> None:
        self.quarantine = entry
        self.shared = shared


def report_fault(
    backend: str,
    m: int,
    n: int,
    k: int,
    *,
    tactic: str | None = None,
    scope: str = "backend",
    format: str = "nvfp4",
    activation: str = "bf16",
    out_dtype: str = "bf16",
    groups: int = 1,
    reason: object = "",
    state_dir: str | os.PathLike[str] | None = None,
) -> Reported:
    """Quarantine a backend that gave a wrong result, raised or hung in production.

    From its return on every reader of this process chooses the next safe one. Those of other
    processes do within a second or two where this one is root's or the state's owner's; else once
    the daemon, or a command of theirs, has taken the report up from the drop box: ``reports``
    beside choices.db, or FP4TUNE_SPOOL. Weights already prepared in another layout, and captured
    CUDA graphs, go on as they are until the engine starts again. `scope` says how far it reaches:
    ``backend`` (everywhere, the default: a fault seen once is a fault of compiled code), ``layer``
    (this n and k) or ``bucket``. `tactic` limits it to one. It holds for the environment the
    backend has now, until it is lifted.

    Where nothing can be written it holds in this process only; `Reported.shared` and a warning say
    so. Raises ValueError, one sentence, for arguments that cannot be a fault; nothing else.
    """
    global _own
    readers = [r for r in _living() if r.generation]
    places: list[str | None] = [os.fspath(state_dir)] if state_dir is not None else []
    if not places:
        paths: list[str | None] = [r.path for r in reversed(readers)]
        for path in paths or [_find()]:
            places.append(os.path.dirname(os.path.abspath(path)) if path else None)
    seen = {
        row["fingerprint"]
        for reader in readers
        for row in _rows_of(reader, backend, (format, activation, out_dtype, groups, n, k))
    }
    reach = quarantine.Reach(
        m, n, k, scope, format=format, activation=activation, out_dtype=out_dtype, groups=groups
    )
    entry = quarantine.make(
        backend,
        reach,
        tactic=tactic,
        reason=reason,
        fingerprint=next(iter(seen)) if len(seen) == 1 else None,
    )
    with _own_lock:
        _own = (*_own, entry)
    for reader in _living():
        reader._learn()
    from . import dropbox  # seldom needed

    shared: str | None = None
    problem = "there is no state directory"
    for place in dict.fromkeys(places):
        try:
            path = dropbox.report(entry, place)
            shared = shared or path
        except StateError as error:
            problem = str(error)
    if shared is None:
        _warn(f"{entry.where()} is quarantined in this process only: {problem}")
    return Reported(entry, shared)


def _living() -> list[Reader]:
    return [reader for one in list(_readers) if (reader := one()) is not None]


def _rows_of(reader: Reader, backend: str, shape: tuple[Any, ...]) -> list[dict[str, Any]]:
    loaded = reader._view.loaded
    scope = reader.scope()
    if loaded is None or scope is None:
        return []
    page = loaded.layer((*scope, *shape)) or {"candidate": []}
    rows = [row for row in page["candidate"] if row["backend"] == backend]
    return rows or [row for row in loaded.rows("candidate") if row["backend"] == backend]


def choose(
    m: int,
    n: int,
    k: int,
    format: str = "nvfp4",
    activation: str = "bf16",
    out_dtype: str = "bf16",
    groups: int = 1,
    arch: str | None = None,
    layout: str | None = None,
) -> Decision:
    """`Reader.choose` on one reader per process, which finds a choices.db as soon as there is one.
    Never raises."""
    return _shared_reader().choose(m, n, k, format, activation, out_dtype, groups, arch, layout)


def _shared_reader() -> Reader:
    global _shared
    if _shared is None:
        _shared = Reader()
    return _shared


def _find() -> str | None:
    places = state.holding_places()
    return _file(places[0]) if places else None


def _file(path: str | os.PathLike[str]) -> str:
    """The file that `path` means, which may be its directory, there or not."""
    plain = os.fspath(path)
    is_file = plain.endswith(".db") or os.path.isfile(plain)
    return plain if is_file and not os.path.isdir(plain) else os.path.join(plain, state.CHOICES)


def _warn(sentence: str) -> None:
    import logging  # slow to import, and seldom needed

    logging.getLogger("fp4tune").warning("%s", printable(sentence))


def _after_fork() -> None:
    # A thread that held a lock does not exist in the child, and would hold it for ever.
    global _own_lock
    _own_lock = allocate_lock()
    for reader in _living():
        reader._lock = allocate_lock()


_readers: list[ref[Reader]] = []
_shared: Reader | None = None
_own: tuple[Quarantine, ...] = ()
"""What this process itself quarantined."""
_own_lock = allocate_lock()
os.register_at_fork(after_in_child=_after_fork)
