"""Whose turn a GPU is: engines share ``gpu-<UUID>.lock``, and a probe needs it alone.

An engine, or anyone who wants no probe beside them (``flock -s``), holds a shared `flock` as long
as it runs. A probe holds it exclusively and never makes an engine wait for long: several times a
second it shares the lock for a moment, and where somebody came in meanwhile, it has lost its turn.
Nothing has to be announced, and a process that dies leaves nothing behind. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import time

from . import state
from .errors import Busy, StateError, translate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

CPU = "cpu"
"""Stands for the UUID where the CPU is probed."""
PULSE = 0.2
"""Seconds between two moments at which a probe shares its lock."""
OPENING = 0.03
"""Seconds that such a moment lasts: long enough for one who waits to be woken."""
_LOOK = 0.01


def path(state_dir: str | os.PathLike[str], uuid: str) -> str:
    """The lock file of one GPU; `uuid` as NVML and nvidia-smi print it, ``GPU-`` included."""
    return state.lock_file(state_dir, "gpu", uuid)


def prepare(state_dir: str | os.PathLike[str], uuids: Iterable[str]) -> None:
    """Make the lock files, so that engines that may only read the directory can share them.

    Raises StateError.
    """
    for uuid in uuids:
        place = path(state_dir, uuid)
        try:
            os.close(os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            raise translate(error, place) from error


def in_use(state_dir: str | os.PathLike[str], uuid: str) -> bool:
    """Whether anyone, engine or probe, holds the lock now. Needs no right to write."""
    return state.held(path(state_dir, uuid), shared=True)


class Share:
    """What `share` holds: descriptors by UUID, and for the others the sentence why not.

    The locks go with the process, or with `close`; a forked child has them, too.
    """

    __slots__ = ("held", "problems")

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.problems: dict[str, str] = {}

    def close(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


def share(state_dir: str | os.PathLike[str], uuids: Iterable[str], wait: float = 5.0) -> Share:
    """Hold these GPUs for an engine: probes on them end within a second, and none begins.

    Waits up to `wait` seconds, over all of them, for a probe to go. Never raises: what cannot be
    held is in `Share.problems`, and the engine starts all the same.
    """
    held = Share()
    deadline = time.monotonic() + wait
    for uuid in uuids:
        place = path(state_dir, uuid)
        try:
            fd = _open_lock(place)
        except OSError as error:
            held.problems[uuid] = f"{place}: {error.strerror}"
            continue
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                held.held[uuid] = fd
                break
            except OSError as error:
                if isinstance(error, BlockingIOError) and time.monotonic() < deadline:
                    time.sleep(_LOOK)
                    continue
                os.close(fd)
                held.problems[uuid] = f"{place}: a probe did not give it up in {wait:g} s"
                break
    return held


def _open_lock(place: str) -> int:
    try:
        return os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(place, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


class Turn:
    """A probe's turn on one GPU: ``with Turn(place, what):``. Raises Busy where someone has it."""

    __slots__ = ("_fd", "path", "what")

    def __init__(self, place: str, what: str = "the GPU") -> None:
        self.path = place
        self.what = what
        self._fd = -1

    def __enter__(self) -> Turn:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise translate(error, self.path) from error
        # A probe that has its moment of sharing would be taken for an engine: look twice.
        for attempt in (True, False):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt:
                    time.sleep(2 * OPENING)
                    continue
                os.close(fd)
                raise Busy(
                    self.path,
                    f"an engine holds {self.what}, and a probe needs it alone; "
                    "probe when the engine has stopped",
                ) from None
            except OSError as error:
                os.close(fd)
                raise translate(error, self.path) from error
        self._fd = fd
        return self

    def kept(self) -> bool:
        """Share the lock for a moment; False if somebody came in, and the turn is over."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            time.sleep(OPENING)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def watch(self, stop: Callable[[float], bool], lost: Callable[[], None]) -> None:
        """Until ``stop(seconds)``, which waits, says so: look, and call `lost` once if it was."""
        while not stop(PULSE):
            if not self.kept():
                lost()
                return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


__all__ = ["CPU", "PULSE", "Share", "StateError", "Turn", "in_use", "path", "prepare", "share"]
