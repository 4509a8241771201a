"""One JSON object a line, over pipes of the worker's own.

stdout and stderr stay free for whatever a backend prints: the worker moves them to a log before
anything is imported, and messages travel over two other descriptors. A line that is not a message
is dropped, since a library may write to any descriptor it finds.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from typing import Any

Message = dict[str, Any]


class Closed(Exception):
    """The other side is gone."""


class Silent(Exception):
    """Nothing arrived in the time allowed."""


class Channel:
    """A two-way line channel over two descriptors. Not thread-safe; each side has one user."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._pending = b""

    def send(self, message: Message) -> None:
        """Raises Closed when nobody reads any more."""
        # The first newline ends whatever a library wrote here without one.
        data = f"\n{json.dumps(message)}\n".encode()
        try:
            while data:
                data = data[os.write(self._write_fd, data) :]
        except OSError as error:
            raise Closed(str(error)) from None

    def receive(self, timeout: float | None = None) -> Message:
        """The next message. Raises Silent after `timeout` seconds, Closed at end of file."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            line, newline, rest = self._pending.partition(b"\n")
            if newline:
                self._pending = rest
                message = _parse(line)
                if message is not None:
                    return message
                continue
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                if not select.select([self._read_fd], [], [], left)[0]:
                    raise Silent(f"nothing arrived for {timeout:g} s")
                data = os.read(self._read_fd, 1 << 16)
            except (OSError, ValueError) as error:
                raise Closed(str(error)) from None
            if not data:
                raise Closed("the other side closed the channel")
            self._pending += data

    def close(self) -> None:
        fds, self._read_fd, self._write_fd = (self._read_fd, self._write_fd), -1, -1
        for fd in fds:
            # Once only: by the second time the number may be another file's.
            with contextlib.suppress(OSError):
                os.close(fd)


def _parse(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
