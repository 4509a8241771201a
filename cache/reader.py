"""How an engine reads the choice: a dictionary look-up that never raises.

``open()`` loads choices.db once; `Reader.choose` then takes under a microsecond and touches no
file, except that an unpinned reader asks the file system once a second whether a newer generation
is there. What no evidence covers is answered with status ``unproven`` and the fallback
``torch-dequant``; what rests on a file that has changed since with ``stale`` and the same
fallback. Standard library only, quick to import.

Shared between threads freely; a process that forks may go on using its reader on both sides.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from bisect import bisect_left

from . import state
from .decision import FALLBACK, Decision
from .errors import Corrupt, Foreign, Missing, NewerSchema, StateError, translate
from .view import View

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["FALLBACK", "Decision", "Reader", "choose", "open"]

INTERVAL = 1.0
"""Seconds between two looks at the file."""

_monotonic = time.monotonic


class Reader:
    """A loaded choices.db. Made by `open`.

    `generation` is 0 while nothing could be loaded; `problem` is the last StateError met in
    loading, None after a success. `pinned` readers keep their generation for good.
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
        self._due = 0.0
        self._lock = threading.Lock()
        _readers.add(self)

    @property
    def generation(self) -> int:
        return self._view.generation

    @property
    def meta(self) -> dict[str, Any]:
        """What the publication says of itself: generation, digest, published, run and more."""
        return dict(self._view.meta)

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
            highs, lows, decisions = view.tables[arch, layout][
                n, k, format, activation, out_dtype, groups
            ]
            at = bisect_left(highs, m)
            if lows[at] <= m:
                return decisions[at]
        except Exception:
            # Whatever was wrong with the question, the answer is the same: not proven.
            pass
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
        """Every candidate that may be chosen here, best first: the successors of a quarantined
        one. Empty where nothing is known. Never raises."""
        view = self._view
        try:
            highs, lows, ranked = view.ranked[arch][n, k, format, activation, out_dtype, groups]
            at = bisect_left(highs, m)
            if lows[at] <= m:
                return ranked[at]
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
            return self._view.layouts[arch].get((n, k, format, activation, out_dtype, groups))
        except Exception:
            return None

    def rows(self, table: str) -> list[dict[str, Any]]:
        """The rows of one table of the generation in use, for reports."""
        return [dict(row) for row in self._view.rows.get(table, ())]

    def refresh(self) -> None:
        """Load a newer generation if there is one; keep the old one if that fails. Never raises.

        One thread does it, the others go on with what they have.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._due = float("inf") if self.pinned and self.generation else _monotonic() + INTERVAL
            if self.pinned and self.generation:
                return
            path = self.path or _find()
            stamp = state.file_stamp(path) if path else None
            if path and stamp and stamp != self._seen:
                self._load(path, stamp)
        except StateError as error:
            self.problem = error
        except Exception as error:
            self.problem = translate(error, self.path or "choices.db")
        finally:
            self._lock.release()

    def _load(self, path: str, stamp: tuple[int, int, int] | None) -> None:
        from . import snapshot  # sqlite3, json and hashlib: when there is something to load

        try:
            loaded = snapshot.load(path)
            view = View(loaded, *self._defaults)
        except (Corrupt, Foreign, NewerSchema):
            self._seen = stamp  # reading the same file again would not help
            raise
        self.path = path
        self._view = view
        self._seen = stamp
        self.problem = None


def open(
    path: str | os.PathLike[str] | None = None,
    *,
    pin: bool = False,
    arch: str | None = None,
    gpu: str | None = None,
    profile: str | None = None,
) -> Reader:
    """Load choices.db: `path` (the file or its directory), else the first place that holds one.

    `pin` keeps this generation whatever is published later: an engine's ranks must agree. `arch`
    (``sm90``, ``cpu``), `gpu` (the model's name) and `profile` say whose choices to answer with
    where the file has several. Raises StateError, one sentence: Missing, Corrupt, Foreign,
    NewerSchema.
    """
    place = _file(path) if path is not None else _find()
    if place is None:
        raise Missing("choices.db", "nothing was published yet in any place readers look")
    reader = Reader(place, pin, arch, gpu, profile)
    reader._load(place, state.file_stamp(place))
    reader._due = float("inf") if pin else _monotonic() + INTERVAL
    return reader


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
    return _default().choose(m, n, k, format, activation, out_dtype, groups, arch, layout)


def _default() -> Reader:
    global _shared
    if _shared is None:
        _shared = Reader()
    return _shared


def _find() -> str | None:
    places = state.holding_places()
    return _file(places[0]) if places else None


def _file(path: str | os.PathLike[str]) -> str:
    plain = os.fspath(path)
    return os.path.join(plain, state.CHOICES) if os.path.isdir(plain) else plain


def _after_fork() -> None:
    # A thread that held a lock does not exist in the child, and would hold it for ever.
    for reader in list(_readers):
        reader._lock = threading.Lock()


_readers: weakref.WeakSet[Reader] = weakref.WeakSet()
_shared: Reader | None = None
os.register_at_fork(after_in_child=_after_fork)
