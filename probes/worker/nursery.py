"""Where the probe starts workers: one fork server for its environment, and a keeper for each.

Variables of the kind that is read when a program, torch or OpenMP are loaded must be the same in
the fork server as in a worker. Where this process has changed one since, another server is started;
where a single worker is to have another value, it is an interpreter of its own.

A server may die at any time (the kernel kills it for memory, a backend kills what it finds), and
what was sent to it and not read is lost with it, even where it seemed to live: who is killed goes
on as long as its memory takes to be given back. So the probe keeps each request, and the worker's
ends of the channel, until a keeper says that the worker runs; where none ever does and the server
is gone, another one is asked.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...machine import processes
from .fork_server import BOOTSTRAP, WARM

_AT_LOAD = (
    "ATEN_", "C10_", "CUBLAS", "CUDA", "CUDNN", "CUPTI", "DNNL_", "GLIBC_", "GOMP_", "KINETO_",
    "KMP_", "LC_", "LD_", "MALLOC_", "MKL_", "NPY_", "NUMEXPR_", "NVIDIA_", "OMP_", "ONEDNN_",
    "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH", "TRITON_",
)  # fmt: skip
"""Beginnings of names of variables that may be read before a worker has its own environment."""
_LATE = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TORCHINDUCTOR_CACHE_DIR")
"""Of those, what is read on the first use of a device or compiler: a fork may have its own."""
_MOST_SERVERS = 4
_OURS = "FP4TUNE_"
_STARTERS = (
    "CACHE_DIRECTORY", "CONFIGURATION_DIRECTORY", "CREDENTIALS_DIRECTORY", "INVOCATION_ID",
    "JOURNAL_STREAM", "LISTEN_", "LOGS_DIRECTORY", "MEMORY_PRESSURE_", "NOTIFY_SOCKET",
    "RUNTIME_DIRECTORY", "STATE_DIRECTORY", "SUDO_", "SYSTEMD_", "WATCHDOG_",
)  # fmt: skip
"""Beginnings of names by which systemd and sudo tell a process what it is run as."""
_FREES = 2.0
"""Seconds beyond its own deadline that a keeper is given to say that all is over; and those that a
server which drops a request is given to be gone."""
_TRIES = 4
"""Servers that are asked for one worker, where each dies before it has started it."""

Loaded = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Start:
    """How a worker is to be started.

    `python` is an interpreter other than this one; `environment` is set besides this process's;
    `alone` asks for an interpreter of its own, as for what is to be the first call of a process.
    """

    python: str | None = None
    environment: Mapping[str, str] | None = None
    alone: bool = False


_A_LITTLE = 0.1
"""Seconds that one thread listens before another may."""


class _Request:
    """What a server is asked for one worker, with descriptors of its own, until it is let go.

    `asked` is the packet's JSON; `base` is what servers of this process are to have at load.
    """

    def __init__(self, asked: dict[str, Any], base: Mapping[str, str], *ends: int) -> None:
        self.asked = asked
        self.base = base
        self._ends = tuple(os.dup(fd) for fd in ends)
        self._tries = 0

    def send(self, server: _Server) -> socket.socket:
        """Ask this server; the probe's end of the keeper's socket. Raises OSError where the server
        is gone."""
        self._tries += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            server.start(self.asked, (*self._ends, theirs.fileno()))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    @property
    def open(self) -> bool:
        """Whether it may be sent to another server."""
        return bool(self._ends) and self._tries < _TRIES

    def let_go(self) -> None:
        """Close the worker's ends of its channel: it has them itself, or is not to be started."""
        for fd in self._ends:
            os.close(fd)
        self._ends = ()


class Kept:
    """The probe's side of a keeper: a worker's process, its log and its end."""

    def __init__(self, request: _Request, ask: Callable[[_Request], _Asked]) -> None:
        self._request = request
        self._ask = ask
        self._server, self._control = ask(request)
        self._poll = select.poll()
        self._poll.register(self._control, select.POLLIN)
        self._listening = threading.Lock()
        self._log = ""
        self._ended = False
        self._keeper: int | None = None
        self.pid: int | None = None
        self.forked: bool | None = None
        """Whether the worker was forked from a process that had torch; None until it runs."""
        self.why: str | None = None
        """Why it was not, where it should have been."""
        self.status: int | None = None
        """Its exit code, or minus the signal that ended it; None where nobody saw its end."""
        self.left: list[int] = []
        """Processes that could not be killed."""

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether the worker and all it started are gone, waiting for that so long at most."""
        self._hear("ended", seconds)
        return self._ended

    def started(self, seconds: float) -> bool:
        """Whether the worker runs, waiting for that so long at most; `pid` is set then."""
        if self.pid is None:
            self._hear("started", seconds)
        return self.pid is not None

    def log(self, seconds: float) -> str:
        """The end of what the worker and its backend printed."""
        if not self._ended:
            with contextlib.suppress(OSError):
                self._control.send(b"log", socket.MSG_DONTWAIT)
            self._hear("log", seconds)
        return self._log

    def end(self, seconds: float) -> bool:
        """Kill the worker and all it started; False if something cannot be killed."""
        self._request.let_go()
        with contextlib.suppress(OSError):
            self._control.send(b"end", socket.MSG_DONTWAIT)
        if not self.ended(seconds):
            self._overrule()
        return self._ended and not self.left

    def close(self) -> None:
        """Let go of the keeper; it ends what is left."""
        with self._listening:
            self._request.let_go()
            self._control.close()
            self._ended = True

    def _hear(self, event: str, seconds: float) -> None:
        """Take what the keeper says until `event`, its end, or the time is over.

        A probe that ends early closes workers that threads of it are still asking, and no two may
        listen at once: each listens a little at a time.
        """
        deadline = time.monotonic() + seconds
        heard = None
        while not self._ended and heard != event:
            left = max(0.0, deadline - time.monotonic())
            with self._listening:
                if self._ended:
                    return
                if self._poll.poll(1000 * min(left, _A_LITTLE)):
                    heard = self._listen()
                    continue
            if left <= _A_LITTLE:
                return
            time.sleep(0)  # a lock that is taken again at once is nobody else's

    def _listen(self) -> str | None:
        """Take the next thing the keeper says, or its end; which it was."""
        try:
            packet = self._control.recv(1 << 17)
        except OSError:
            packet = b""
        heard = self._take(json.loads(packet)) if packet else None
        self._ended = self._ended or not (packet or self._asked_again())
        return heard

    def _asked_again(self) -> bool:
        """Ask another server for a worker that no keeper has spoken of, where the one that was
        asked is gone, and the request with it."""
        try:
            if not (self._request.open and self._server.gone(_FREES)):
                raise OSError("there is nobody to ask, or nothing to ask for")
            server, control = self._ask(self._request)
        except OSError:
            self._request.let_go()
            return False
        self._poll.unregister(self._control)
        self._control.close()
        self._server, self._control = server, control
        self._poll.register(control, select.POLLIN)
        return True

    def _take(self, said: dict[str, Any]) -> str:
        self._log = said.get("log", self._log)
        if said["event"] == "started":
            self._request.let_go()
            self._keeper, self.pid = said["keeper"], said["pid"]
            self.forked, self.why = said["forked"], said["why"]
        elif said["event"] == "ended":
            self.status, self.left, self._ended = said["status"], said["left"], True
        return str(said["event"])

    def _overrule(self) -> None:
        """End a keeper that does not answer, as one that was stopped does not, with its tree."""
        if self._keeper is None:
            return
        tree = processes.descendants(self._keeper)
        for pid in (self._keeper, *tree):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self.ended(_FREES)


class _Server:
    """The probe's side of a fork server."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(BOOTSTRAP), "serve", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                # A library of numpy's would start threads of its own, and it is never used.
                env={"OPENBLAS_NUM_THREADS": "1", **environment},
            )
        finally:
            theirs.close()

    def gone(self, seconds: float = 0.0) -> bool:
        """Whether nobody reads requests any more, waiting for that so long at most.

        By the socket, which a process that was killed closes some time before it can be waited for.
        """
        if self._control.fileno() < 0:
            return True  # `close`
        poll = select.poll()
        poll.register(self._control, 0)  # its end is always told
        return bool(poll.poll(1000 * seconds)) or self._process.poll() is not None

    def warm(self) -> None:
        """Have it import what forks need, without waiting for that."""
        with contextlib.suppress(OSError):
            self._control.send(WARM, socket.MSG_DONTWAIT)

    def start(self, asked: dict[str, Any], fds: Sequence[int]) -> None:
        """Ask for a worker: the request as JSON, and the three descriptors that go with it."""
        request = os.memfd_create("request")
        try:
            with open(request, "wb", closefd=False) as file:
                file.write(json.dumps(asked).encode(errors="surrogateescape"))
            socket.send_fds(self._control, [b"w"], [request, *fds])
        finally:
            os.close(request)

    def close(self) -> None:
        """End it, in the middle of an import or not. What it has started goes on, and what it was
        asked and has not started is asked of another."""
        self._control.close()
        self._process.kill()
        self._process.wait()


_Asked = tuple[_Server, socket.socket]
"""The server that was asked for a worker, and the probe's end of the keeper's socket."""


class Nursery:
    """This process's fork servers, by what was in the environment when they were started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servers: dict[Loaded, _Server] = {}
        self._owner = os.getpid()

    def start(self, how: Start, read_fd: int, write_fd: int) -> Kept:
        """Start a worker with these ends of its channel; does not wait until it runs."""
        base = environment()
        own = {**base, **(how.environment or {}), "PYTHONUNBUFFERED": "1"}
        usual = _at_load({**base, "PYTHONUNBUFFERED": "1"})
        asked = {
            "python": how.python,
            "fork": how.python is None and not how.alone and _at_load(own) == usual,
            "environment": own,
            "folder": os.getcwd(),
        }
        request = _Request(asked, base, read_fd, write_fd)
        try:
            return Kept(request, self._ask)
        except BaseException:
            request.let_go()
            raise

    def _ask(self, request: _Request) -> _Asked:
        """Send the request to a server that lives. Raises OSError where each one dies."""
        while True:
            with self._lock:
                server = self._server(request.base)
                try:
                    return server, request.send(server)
                except OSError:
                    # It died between the look and the packet.
                    if not (request.open and server.gone(_FREES)):
                        raise

    def warm(self) -> None:
        """Begin to import torch in a fork server, while this process does something else."""
        with self._lock:
            self._server(environment()).warm()

    def _server(self, base: Mapping[str, str]) -> _Server:
        if self._owner != os.getpid():
            # A fork of the process that these belong to.
            self._servers, self._owner = {}, os.getpid()
        key = _at_load(base)
        there = self._servers.get(key)
        if there is None or there.gone():
            if there is not None:
                self._servers.pop(key).close()
            elif len(self._servers) >= _MOST_SERVERS:
                self._servers.pop(next(iter(self._servers))).close()
            there = self._servers[key] = _Server(base)
        return there

    def close(self) -> None:
        """End the servers. Workers that run go on, and end with this process."""
        with self._lock:
            while self._owner == os.getpid() and self._servers:
                self._servers.popitem()[1].close()


def environment() -> dict[str, str]:
    """This process's environment without what tells of fp4tune, or of who started it: what workers
    are given. A shell's ``_`` is the program that it ran."""
    told = (_OURS, *_STARTERS)
    return {k: v for k, v in os.environ.items() if k != "_" and not k.startswith(told)}


def settings() -> dict[str, str]:
    """What a worker is told of instead, as it starts (`probes.settings`)."""
    return {k: v for k, v in os.environ.items() if k.startswith(_OURS)}


def _at_load(variables: Mapping[str, str]) -> Loaded:
    return frozenset(
        (name, value)
        for name, value in variables.items()
        if name.startswith(_AT_LOAD) and name not in _LATE
    )


nursery = Nursery()
atexit.register(nursery.close)


def warm(python: str | None = None) -> None:
    """Begin to import torch where workers are to be forked from; nothing where they are run by
    another interpreter."""
    if python is None:
        nursery.warm()
