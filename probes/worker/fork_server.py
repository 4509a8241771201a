"""The process that workers are forked from: it has imported torch, and never asked CUDA anything.

``import torch`` costs a new interpreter seconds; a fork of one that has it costs milliseconds. The
server does nothing but import. It has one thread when it forks, has run no OpenMP region and has
not opened the driver, and looks at that each time: a process that had could not be forked safely,
and then the worker is an interpreter of its own, as it is where the request says so. Workers of
other interpreters are started from here, too, so that each has its keeper (`keeper`).

A request is one packet of a socket with four descriptors: a file with the request as JSON
(``python``, ``fork``, ``environment``, ``folder``), the worker's ends of its channel, and the
keeper's end of its socket. Nothing is answered here; the keeper answers there.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ...machine import processes
from .keeper import Keeper

BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
DESCRIPTORS = 4
"""Sent with each request."""
WARM = b"warm"
"""Asks for nothing but what forks need to be imported."""
_LOOK = 0.25
"""Seconds between two looks at children that have ended."""
_LOOKS = 8
"""How often orphans are looked for after the last sign of one."""
_NO_EXECUTABLE = 127

Role = Callable[[], None]


def serve(control_fd: int) -> Role | None:
    """Serve until the probe closes the socket. Returns in the server with None, and in every
    worker that is forked with what it is to do."""
    control = socket.socket(fileno=control_fd)
    os.set_inheritable(control_fd, False)
    processes.adopt_orphans()
    poll = select.poll()
    poll.register(control, select.POLLIN)
    nest = _Nest()
    while True:
        if poll.poll(1000 * _LOOK):
            request, fds, _, _ = socket.recv_fds(control, len(WARM), DESCRIPTORS)
            if not request:
                return None
            if request == WARM:
                _imported()
                continue
            made = _start_keeper(control, fds)
            if not isinstance(made, int):
                return made
            nest.keepers.add(made)
        nest.tidy()


class _Nest:
    """The server's children: keepers, and what a keeper leaves behind that is itself killed."""

    def __init__(self) -> None:
        self.keepers: set[int] = set()
        self._looks = 0

    def tidy(self) -> None:
        """Wait for what has ended; after a keeper's death, end what it kept."""
        processes.reap(self._reaped)
        if self._looks:
            self._looks -= 1
            for pid in processes.children(os.getpid()):
                if pid not in self.keepers:
                    for each in (pid, *processes.descendants(pid)):
                        with contextlib.suppress(ProcessLookupError, PermissionError):
                            os.kill(each, signal.SIGKILL)

    def _reaped(self, pid: int, status: int) -> None:
        if pid not in self.keepers or status:
            self._looks = _LOOKS  # its tree comes here one by one, as each parent in it dies
        self.keepers.discard(pid)


def _start_keeper(control: socket.socket, fds: list[int]) -> int | Role:
    """Fork a keeper, which starts the worker: its process id, or in a worker its role."""
    request_fd, read_fd, write_fd, keeper_fd = fds
    with open(request_fd, "rb") as file:
        file.seek(0)
        asked: dict[str, Any] = json.loads(file.read())
    why = unfit() if asked["fork"] and _imported() else None
    forked = bool(asked["fork"]) and _imported() and why is None
    keeper = os.fork()
    if keeper:
        for fd in (read_fd, write_fd, keeper_fd):
            os.close(fd)
        return keeper
    control.close()
    return _keep_worker(asked, (read_fd, write_fd, keeper_fd), forked, why)


def _keep_worker(
    asked: dict[str, Any], fds: tuple[int, int, int], forked: bool, why: str | None
) -> Role:
    """In the keeper: start the worker and keep it. Returns in a forked worker only."""
    read_fd, write_fd, keeper_fd = fds
    os.setsid()
    processes.adopt_orphans()
    log_read, log_write = os.pipe()
    keeper = os.getpid()
    worker = os.fork()
    if worker:
        for fd in (read_fd, write_fd, log_write):
            os.close(fd)
        Keeper(worker, socket.socket(fileno=keeper_fd), log_read).run(forked, why)
    os.setsid()
    processes.die_with_parent(keeper)
    os.close(keeper_fd)
    os.close(log_read)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, place in ((nothing, 0), (log_write, 1), (log_write, 2)):
        os.dup2(fd, place)
    os.close(nothing)
    os.close(log_write)
    with contextlib.suppress(OSError):
        os.chdir(asked["folder"])
    if not forked:
        _exec(asked, read_fd, write_fd)
    return lambda: _become(asked["environment"], read_fd, write_fd)


def _exec(asked: dict[str, Any], read_fd: int, write_fd: int) -> NoReturn:
    python = asked["python"] or sys.executable
    for fd in (read_fd, write_fd):
        os.set_inheritable(fd, True)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    words = [python, str(BOOTSTRAP), "work", str(read_fd), str(write_fd)]
    try:
        os.execvpe(python, words, asked["environment"])
    except OSError as error:
        os.write(2, f"{python} cannot be started: {error.strerror}\n".encode())
        os._exit(_NO_EXECUTABLE)


def _become(environment: dict[str, str], read_fd: int, write_fd: int) -> None:
    """In a forked worker: what a new interpreter would have been given, and then its work."""
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    gc.unfreeze()
    from .server import main

    main(read_fd, write_fd)


def _imported() -> bool:
    """Import what workers need; False where that is not installed, which a worker will say."""
    if "torch" in sys.modules:
        return True
    try:
        from . import session  # noqa: F401
    except Exception:
        return False
    with contextlib.suppress(ImportError):
        import numpy.random  # noqa: F401  its state is looked at in every worker
    # Torch has some to take its operators apart, which at the end of a worker is of no use.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    # What is here now is never collected, so a worker's collections need not copy its pages.
    gc.collect()
    gc.freeze()
    return True


def unfit() -> str | None:
    """Why this process cannot be forked into workers now, in one sentence; None if it can."""
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        return f"the fork server has {len(threads)} threads and may fork with one only"
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        return "the fork server has initialised CUDA, which no fork of it could use"
    if opened := _driver_files():
        return f"the fork server has opened {opened[0]}, and a driver does not survive a fork"
    return None


def _driver_files() -> list[str]:
    """Files of the NVIDIA driver that this process holds open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{name}")
            if path.startswith("/dev/nvidia"):
                found.append(path)
    return found
