"""Processes and what they start: dying with a parent, adopting orphans, and ending whole trees.

Linux only in effect: elsewhere the requests to the kernel do nothing. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SWEEP = 0.002
"""Seconds between two looks at what is left of a tree that is being killed."""
_CHASES = 500
"""Looks at what was adopted in the meantime, between two at the whole table."""


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies, however that dies.

    To be called first of all in a child, with the parent's process id where that is known: a parent
    that died before the call is noticed by it, and then this process ends here. The kernel takes
    the *thread* that started the child for the parent: start children that are to live from a
    thread that does.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def dying_with_parent() -> Callable[[], None]:
    """A ``preexec_fn`` for `subprocess.Popen`: the child it starts dies with this process.

    Everything that takes a lock is done here, before the fork; the function itself makes two
    system calls.
    """
    prctl, parent = _prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def adopt_orphans() -> None:
    """Make this process the parent of every descendant that loses its own (a child subreaper)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def children(pid: int) -> list[int]:
    """The living processes whose parent is `pid`."""
    return [each.pid for each in _process_table() if each.parent == pid and each.lives]


def descendants(pid: int) -> list[int]:
    """Every living process below `pid`, nearest first; zombies are not counted.

    From /proc: a process is found by its parents, whatever session, group or environment it has.
    """
    return [each.pid for each in _entries_below(pid) if each.lives]


def _entries_below(pid: int) -> list[_Entry]:
    """Every process below `pid`, nearest first, zombies included."""
    below: dict[int, list[_Entry]] = {}
    for each in _process_table():
        below.setdefault(each.parent, []).append(each)
    found: list[_Entry] = []
    queue = [pid]
    for parent in queue:
        found += below.get(parent, ())
        queue += (each.pid for each in below.get(parent, ()))
    return found


def end_tree(reaped: Callable[[int, int], None], seconds: float) -> list[int]:
    """Kill every descendant of this process, which must be one that adopts orphans.

    `reaped(pid, status)` is called for each child of this process that was waited for. Returns
    those that still live after `seconds` (in a system call that does not end, or another user's);
    usually none.

    One that forks and ends, again and again, is gone before a list of processes is read. But its
    group stays: the kernel kills a group as a whole, those being forked, too. Only groups of other
    sessions than this process's are, which none but descendants can have made. And one that makes
    a group each time is chased as it is adopted.
    """
    deadline = time.monotonic() + seconds
    session = os.getsid(0)
    while True:
        if not reap(reaped):
            return []  # no child at all: an orphan would be one
        found = _entries_below(os.getpid())
        left = [each.pid for each in found if each.lives]
        groups = {each.group for each in found if each.session != session}
        # Stopped first, so that none starts another behind the list's back.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for kill, numbers in ((os.killpg, groups), (os.kill, left)):
                for each in numbers:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        kill(each, number)
        for _ in range(_CHASES):
            adopted = _adopted()
            for pid in adopted:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not adopted or not reap(reaped):
                break
        if time.monotonic() > deadline:
            return left
        time.sleep(_SWEEP)


def _adopted() -> list[int]:
    """The children of this process, by the kernel's own list; none where it keeps none."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def reap(reaped: Callable[[int, int], None]) -> bool:
    """Wait for every child that has ended, without blocking; False if there is no child left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if not pid:
            return True
        reaped(pid, status)


def processes() -> list[int]:
    """The numbers of all processes that can be seen from here."""
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the table of processes; `lives` is false of a zombie."""

    pid: int
    parent: int
    group: int
    session: int
    lives: bool


def _process_table() -> Iterator[_Entry]:
    """Every process there is."""
    for pid in processes():
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The name in front may hold anything, brackets and spaces, too.
                state, *numbers = file.read().rpartition(b")")[2].split()[:4]
            parent, group, session = map(int, numbers)
            yield _Entry(pid, parent, group, session, state not in (b"Z", b"X"))


def _libc() -> Callable[[int, int], object]:
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        return lambda what, value: prctl(what, int(value), 0, 0, 0)
    return lambda what, value: None


_prctl = _libc()
