"""Whose turn a GPU is: engines share ``gpu-<UUID>.lock``, and a probe needs it alone.

An engine, or anyone who wants no probe beside them (``flock -s``), holds a shared `flock` as long
as it runs. A probe holds it exclusively and never makes an engine wait for long: several times a
second it shares the lock for a moment, and where somebody came in meanwhile, it has lost its turn.
Nothing has to be announced, and a process that dies leaves nothing behind.

Any local user can hold a file that engines of any user share. So a holder that is neither root nor
who owns the state counts only while it has a GPU open (for the CPU's lock: torch loaded): any other
is named and passed over, and looked at again as long as it stays. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import time

from ..machine import files
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
_LOOKS = 8


def path(state_dir: str | os.PathLike[str], uuid: str) -> str:
    """The lock file of one GPU; `uuid` as NVML and nvidia-smi print it, ``GPU-`` included."""
    return os.path.join(os.fspath(state_dir), state.lock_name("gpu", uuid))


def prepare(state_dir: str | os.PathLike[str], uuids: Iterable[str]) -> None:
    """Make the lock files, so that engines that may only read the directory can share them.

    Raises StateError.
    """
    for uuid in uuids:
        place = path(state_dir, uuid)
        try:
            os.close(files.descriptor(place, flags=os.O_RDWR | os.O_CREAT, mode=0o644))
        except OSError as error:
            raise translate(error, place) from error


class LockLook:
    """Who holds a GPU's lock: whether somebody who `counts` does, engine or probe, and the others
    (sentences), who are `passed` over."""

    __slots__ = ("counts", "passed")

    def __init__(self, counts: bool, passed: tuple[str, ...] = ()) -> None:
        self.counts = counts
        self.passed = passed


def watched(place: str) -> LockLook:
    """Who holds the lock at `place`. Who cannot be told is an engine; those who come and go are
    looked at again, so that nobody is taken for one by being quick."""
    for _ in range(_LOOKS):
        found = _judged(place)
        if found is not None:
            return found
        time.sleep(_LOOK / 2)
        if not state.held(place, shared=True):
            return LockLook(False)
    return LockLook(True)


def _judged(place: str) -> LockLook | None:
    """Who is listed as holding the lock; None where one of them has gone meanwhile."""
    from ..machine import holders

    cpu = os.path.basename(place) == state.lock_name("gpu", CPU)
    without = "and has not loaded torch" if cpu else "and has no GPU open"
    ours = state.trusted(os.path.dirname(place))
    passed: list[str] = []
    for each in holders.holders(place):
        # A lock outlives who took it in whoever was given it, and the number may be another's.
        there = holders.holds(each.pid, place)
        now = holders.all_holders(place) if there is False else [each]
        if not now:
            return None
        for holder in now:
            if holder.users is None or ours.issuperset(holder.users):
                return LockLook(True)
            if there is None or holders.computes(holder.pid, cpu) is not False:
                return LockLook(True)
            passed.append(f"{holder} holds {place} {without}: it is passed over")
    return LockLook(False, tuple(dict.fromkeys(passed))) if passed else None


def look(state_dir: str | os.PathLike[str], uuid: str) -> LockLook:
    """Who holds a GPU's lock now. Needs no right to write."""
    place = path(state_dir, uuid)
    return watched(place) if state.held(place, shared=True) else LockLook(False)


def in_use(state_dir: str | os.PathLike[str], uuid: str) -> bool:
    """Whether anyone, engine or probe, holds the lock now. Needs no right to write."""
    return look(state_dir, uuid).counts


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
                stranger = _stranger(place)
                waits = isinstance(error, BlockingIOError) and time.monotonic() < deadline
                if waits and stranger is None:
                    time.sleep(_LOOK)
                    continue
                os.close(fd)
                why = stranger or f"a probe did not give it up in {wait:g} s"
                held.problems[uuid] = f"{place}: {why}"
                break
    return held


def _stranger(place: str) -> str | None:
    """Who holds a lock alone and is no probe, which only those are who may write here."""
    from ..machine.holders import holders

    ours = state.trusted(os.path.dirname(place))
    alone = [each for each in holders(place) if each.alone]
    if not alone or any(each.users is None or ours.issuperset(each.users) for each in alone):
        return None
    return f"{alone[0]} holds it alone, which is no probe, and is not waited for"


def _open_lock(place: str) -> int:
    try:
        return files.descriptor(place)
    except FileNotFoundError:
        return files.descriptor(place, flags=os.O_RDONLY | os.O_CREAT, mode=0o644)


class Turn:
    """A probe's turn on one GPU: ``with Turn(place, what):``. Raises Busy where someone has it.

    `passed` says who holds the lock and was passed over: then it is not held, and every moment it
    is looked whether one of them has begun to compute, or an engine has come.
    """

    __slots__ = ("_fd", "passed", "path", "what")

    def __init__(self, place: str, what: str = "the GPU") -> None:
        self.path = place
        self.what = what
        self.passed: tuple[str, ...] = ()
        self._fd = -1

    def __enter__(self) -> Turn:
        try:
            fd = files.descriptor(self.path, flags=os.O_RDWR | os.O_CREAT, mode=0o644)
        except OSError as error:
            raise translate(error, self.path) from error
        # A probe that has its moment of sharing would be taken for an engine: look twice.
        for attempt in (True, False):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                found = watched(self.path)
                if not found.counts:
                    self.passed = found.passed
                    break
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
        except BlockingIOError:
            pass  # one who is passed over has it alone
        except OSError:
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.passed = ()
        except BlockingIOError:
            # Nothing is held for as long as the others are looked at: it would be taken for theirs.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            found = watched(self.path)
            self.passed = found.passed
            return not found.counts
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
