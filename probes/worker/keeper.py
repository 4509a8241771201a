"""The process between a fork server and one worker: it keeps the worker's log, and ends its tree.

Whatever a worker starts, in a session of its own, with an empty environment, orphaned on purpose,
is a descendant of its keeper, which adopts orphans: so all of it is found and killed when the
worker ends, when the probe says so, and when the probe is gone.

The probe and a keeper speak over a socket of theirs, a JSON object a packet. The keeper says

started   ``keeper`` (its process id), ``pid`` (of the worker), ``forked``, and ``why`` it is not
log       when it is asked for that
ended     last: ``status`` (an exit code, or minus a signal), ``log``, and ``left``, the processes
          that could not be killed

It is asked by the packets ``log`` and ``end``; the socket's end means the same as ``end``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
from typing import Any, NoReturn

from ...machine import processes
from ...machine.last_words import Ring

KILL_SECONDS = 10.0
"""How long killed processes may take to be gone."""
_AFTERWARDS = 600.0
"""How long it goes on trying when that was said."""
_SAID = 8000
"""Bytes of a log that are sent."""
_PIECE = 1 << 16


class Keeper:
    """What a keeper does once its worker runs; `run` ends this process."""

    def __init__(self, worker: int, control: socket.socket, log_fd: int) -> None:
        self._worker = worker
        self._control = control
        self._log_fd = log_fd
        self._ring = Ring()
        self._status: int | None = None
        self._wake_fd, wake = os.pipe()
        for fd in (log_fd, self._wake_fd, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def run(self, forked: bool, why: str | None) -> NoReturn:
        self._say(event="started", keeper=os.getpid(), pid=self._worker, forked=forked, why=why)
        poll = select.poll()
        for fd in (self._control.fileno(), self._log_fd, self._wake_fd):
            poll.register(fd, select.POLLIN)
        going = processes.reap(self._reaped) and self._status is None
        while going:
            for fd, _ in poll.poll():
                if fd == self._log_fd and not self._drain(once=True):
                    poll.unregister(fd)
                elif fd == self._wake_fd:
                    _drop(fd)
                    going = processes.reap(self._reaped) and self._status is None and going
                elif fd == self._control.fileno():
                    going = self._asked() and going
        self._end()

    def _asked(self) -> bool:
        """Answer the probe; False when the worker is to end."""
        try:
            order = self._control.recv(64)
        except OSError:
            return False
        if order == b"log":
            self._drain()
            self._say(event="log", log=self._ring.tail(_SAID))
        return order == b"log"

    def _end(self) -> NoReturn:
        left = processes.end_tree(self._reaped, KILL_SECONDS)
        self._drain()
        status = -signal.SIGKILL if self._status is None else self._status
        self._say(event="ended", status=status, left=left, log=self._ring.tail(_SAID))
        if left:
            # Without this process they would be nobody's, and could go on for ever.
            processes.end_tree(self._reaped, _AFTERWARDS)
        os._exit(0)

    def _reaped(self, pid: int, status: int) -> None:
        if pid == self._worker:
            self._status = os.waitstatus_to_exitcode(status)

    def _drain(self, once: bool = False) -> bool:
        """Take what is in the log's pipe; False at its end."""
        # Bounded: who writes without end may be a process that could not be killed.
        for _ in range(1 if once else 64):
            try:
                data = os.read(self._log_fd, _PIECE)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._ring.add(data)
        return True

    def _say(self, **message: Any) -> None:
        # Nobody may be there any more, or nobody may read: neither is a reason to stay.
        with contextlib.suppress(OSError):
            self._control.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)


def _drop(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, _PIECE):
            pass
