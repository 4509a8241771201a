"""The end of what a process prints, however much that is: in memory, and bounded."""

from __future__ import annotations

import os
import select
import time

KEPT_BYTES = 1 << 16
"""The end of what was printed that is kept."""
_PIECE = 1 << 16


class Ring:
    """The last `KEPT_BYTES` of a stream."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def add(self, data: bytes) -> None:
        self._kept += data
        if len(self._kept) > 2 * KEPT_BYTES:
            del self._kept[:-KEPT_BYTES]

    def tail(self, size: int = KEPT_BYTES) -> str:
        return bytes(self._kept[-min(size, KEPT_BYTES) :]).decode(errors="replace")


class LastWords:
    """What a process says through a pipe, taken by who waits for it: give it `fd`, then `listen`.

    A process that nobody listens to is held up once the pipe is full. Use ``with``.
    """

    def __init__(self) -> None:
        self._read_fd, self.fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._ring = Ring()
        self._ended = False

    def __enter__(self) -> LastWords:
        return self

    def __exit__(self, *error: object) -> None:
        self.begun()
        os.close(self._read_fd)

    def begun(self) -> None:
        """Let go of `fd`: the process has it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def listen(self, seconds: float) -> None:
        """Take what comes, or wait that long for it."""
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        if self._ended:
            time.sleep(seconds)
        elif poll.poll(1000 * seconds):
            self._take()

    def line(self) -> str:
        """The last line that was said."""
        for _ in range(2 * KEPT_BYTES // _PIECE):  # who writes on may never end
            self._take()
        lines = self._ring.tail().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _take(self) -> None:
        try:
            data = b"" if self._ended else os.read(self._read_fd, _PIECE)
        except BlockingIOError:
            return
        self._ended = not data
        self._ring.add(data)
