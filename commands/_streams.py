"""stdout and stderr of the program: what nobody reads any more is dropped, and ends nothing."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class Forgiving(io.RawIOBase):
    """A descriptor for writing that drops what is written once its reader is gone.

    A closed pipe (``fp4tune show | head``) is then no verdict: the command goes on and ends with
    the exit code that it has.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._gone = False

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = len(memoryview(data).cast("B"))
        if self._gone:
            return size
        try:
            return os.write(self._fd, data)
        except BrokenPipeError:
            self._gone = True
            return size
        except OSError:
            self._gone = True  # told once: what comes after it has nowhere to go either
            raise


def forgiving(stream: TextIO | None, fd: int) -> TextIO:
    """A text stream in the place of `stream`: forgiving, and without a character that its encoding
    lacks being a reason to end in a traceback. Where there is none, as after ``>&-``, nobody wants
    to hear, and `fd` is made one that nobody does."""
    encoding = "utf-8"
    if stream is None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != fd:
            os.dup2(nowhere, fd)
            os.close(nowhere)
    else:
        try:
            fd = stream.fileno()
        except (OSError, ValueError, AttributeError):
            return stream
        stream.flush()
        encoding = stream.encoding
    raw = Forgiving(fd)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=raw.isatty() or fd == 2,
    )


def forgive() -> None:
    """Make both streams of this process so."""
    sys.stdout, sys.stderr = forgiving(sys.stdout, 1), forgiving(sys.stderr, 2)


def flushed() -> bool:
    """Whether all that was printed is written; False where it cannot be, as on a full disk."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return False
    return True
