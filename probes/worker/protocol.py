"""One JSON object a line, over pipes of the worker's own.

stdout and stderr stay free for whatever a backend prints: the worker moves them to a log before
anything is imported, and messages travel over two other descriptors. A library may write to any
descriptor it finds, and a hostile one may write what looks like a message. So what a worker sends
is signed: each line begins with a secret that the worker was told before it imported anything, and
a line without it is dropped unread. Nor does it count as a sign of life, however much of it comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

MOST_BYTES = 64 << 20
"""A line that is longer is no message of ours."""
_PIECE = 1 << 16


class Closed(Exception):
    """The other side is gone."""


class Silent(Exception):
    """Nothing arrived in the time allowed, or nothing could be sent in it."""


class Channel:
    """A two-way line channel over two descriptors. Not thread-safe; each side has one user.

    What is sent begins with `signs`, and what is received must begin with `expects`.
    """

    def __init__(
        self, read_fd: int, write_fd: int, *, signs: bytes = b"", expects: bytes = b""
    ) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self.signs = signs
        self._expects = expects
        self._pending = bytearray()
        self._searched = 0
        """Bytes of `_pending` that are known to hold no end of a line."""
        self._too_long = False
        """The line that is arriving is longer than a message: dropped to its end."""

    def send(self, message: Message, timeout: float | None = None) -> None:
        """Raises Closed when nobody reads any more, Silent when nobody does for `timeout` seconds,
        and ValueError for a message that is longer than `MOST_BYTES`."""
        text = json.dumps(message).encode()
        if len(text) > MOST_BYTES:
            raise ValueError(f"a message of {len(text)} bytes is longer than {MOST_BYTES}")
        # The first newline ends whatever a library wrote here without one.
        data = memoryview(b"\n" + self.signs + text + b"\n")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while data:
                left = _left(deadline)
                if left is not None and not _ready(self._write_fd, select.POLLOUT, left):
                    raise Silent(f"nothing was read for {timeout:g} s")
                # With a deadline no more than a pipe that is writable takes without waiting.
                piece = data if left is None else data[: select.PIPE_BUF]
                data = data[os.write(self._write_fd, piece) :]
        except (OSError, ValueError) as error:
            raise Closed(str(error)) from None

    def receive(
        self, timeout: float | None = None, accept: Callable[[Message], bool] | None = None
    ) -> Message:
        """The next message that is accepted; others are dropped.

        Raises Silent after `timeout` seconds whatever else arrives meanwhile, Closed at end of
        file.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        read = False
        while True:
            line = self._line()
            if line is not None:
                message = self._parse(line)
                if message is not None and (accept is None or accept(message)):
                    return message
            if read and deadline is not None and time.monotonic() >= deadline:
                raise Silent(f"nothing arrived for {timeout:g} s")
            if line is None:
                self._read(deadline, timeout)
                read = True

    def _line(self) -> bytes | None:
        """A line that is here in full."""
        end = self._pending.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._pending)
            if self._searched > MOST_BYTES + len(self._expects):
                self._too_long = True
                self._pending.clear()
                self._searched = 0
            return None
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        self._searched = 0
        if self._too_long:
            self._too_long = False
            return b""
        return line

    def _read(self, deadline: float | None, timeout: float | None) -> None:
        try:
            if not _ready(self._read_fd, select.POLLIN, _left(deadline)):
                raise Silent(f"nothing arrived for {timeout:g} s")
            data = os.read(self._read_fd, _PIECE)
        except (OSError, ValueError) as error:
            raise Closed(str(error)) from None
        if not data:
            raise Closed("the other side closed the channel")
        self._pending += data

    def _parse(self, line: bytes) -> Message | None:
        if not line.startswith(self._expects):
            return None
        try:
            message = json.loads(line[len(self._expects) :])
        except (ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        fds, self._read_fd, self._write_fd = {self._read_fd, self._write_fd}, -1, -1
        for fd in fds:
            # Once only: by the second time the number may be another file's.
            with contextlib.suppress(OSError):
                os.close(fd)


def _ready(fd: int, events: int, seconds: float | None) -> bool:
    """Whether `fd` can be read or written within `seconds`; also where it is closed or broken."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
