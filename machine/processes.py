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

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SWEEP = 0.002
"""Seconds between two looks at what is left of a tree that is being killed."""


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
    return [
        child for child, parent, state in _process_table() if parent == pid and state not in "ZX"
    ]


def descendants(pid: int) -> list[int]:
    """Every living process below `pid`, nearest first; zombies are not counted.

    From /proc: a process is found by its parents, whatever session, group or environment it has.
    """
    below: dict[int, list[int]] = {}
    for child, parent, state in _process_table():
        if state not in "ZX":
            below.setdefault(parent, []).append(child)
    found: list[int] = []
    queue = [pid]
    for each in queue:
        found += below.get(each, ())
        queue += below.get(each, ())
    return found


def end_tree(reaped: Callable[[int, int], None], seconds: float) -> list[int]:
    """Kill every descendant of this process, which must be one that adopts orphans.

    `reaped(pid, status)` is called for each child of this process that was waited for. Returns
    those that still live after `seconds` (in a system call that does not end, or another user's);
    usually none.
    """
    deadline = time.monotonic() + seconds
    while True:
        if not reap(reaped):
            return []  # no child at all: an orphan would be one
        left = descendants(os.getpid())
        # Stopped first, so that none starts another behind the list's back.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        if time.monotonic() > deadline:
            return left
        time.sleep(_SWEEP)


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


def _process_table() -> Iterator[tuple[int, int, str]]:
    """(process, parent, state) of every process there is."""
    for pid in processes():
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The name in front may hold anything, brackets and spaces, too.
                state, parent = file.read().rpartition(b")")[2].split()[:2]
            yield pid, int(parent), state.decode()


def _libc() -> Callable[[int, int], object]:
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        return lambda what, value: prctl(what, int(value), 0, 0, 0)
    return lambda what, value: None


_prctl = _libc()
