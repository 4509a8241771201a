"""A child process of the daemon, with all it starts: begun, looked after, and ended within moments.

Nothing in its environment says so: it is known by its descent (`beside`, `family`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

import psutil

from .family import end_below, kill, lives, living_below, resident

_TAIL = 4000


class Child:
    """A running command of fp4tune. `ended` is why it was ended, where it was."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        nice: int = 0,
        say: bytes = b"",
    ) -> None:
        self.started = time.monotonic()
        self.ended: str | None = None
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._in = tempfile.TemporaryFile()  # noqa: SIM115
        self._in.write(say)
        self._in.seek(0)
        own = [sys.executable, "-m", "fp4tune.daemon.beside", str(os.getpid()), str(nice), module]
        self._seen: dict[int, psutil.Process] = {}
        self._process = subprocess.Popen(
            [*own, *arguments],
            stdin=self._in,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
            env=dict(environ),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def family(self) -> list[int]:
        """Every living process of this child's, itself first if it lives."""
        own = [self._process.pid] if self._process.poll() is None else []
        return own + [process.pid for process in self._below()]

    def _below(self) -> list[psutil.Process]:
        """The living descendants, and those of them that were seen before and live on."""
        if self._process.poll() is None:
            self._seen.update((process.pid, process) for process in living_below(self._process.pid))
        self._seen = {pid: process for pid, process in self._seen.items() if lives(process)}
        return list(self._seen.values())

    def end(self, why: str) -> None:
        """Kill it with all it started; does not wait. `family` says what is still there."""
        if self.ended is None:
            self.ended = why
        for process in self._below():
            kill(process)
        if self._process.poll() is None:
            # The process itself comes last: what its descendants leave behind comes to it.
            for process in end_below(self._process.pid):
                self._seen[process.pid] = process
            with contextlib.suppress(OSError):
                self._process.kill()

    def rss(self) -> int:
        """Resident bytes of all its processes; shared pages count in each."""
        return resident(self._below())

    def output(self) -> bytes:
        return _read_some(self._out, 1 << 20, False)

    def said(self) -> str:
        """The last line it wrote on stderr."""
        lines = _read_some(self._err, _TAIL, True).decode(errors="replace").strip().splitlines()
        return lines[-1][:400] if lines else ""

    def close(self) -> None:
        for file in (self._out, self._err, self._in):
            file.close()


def _read_some(file: object, size: int, tail: bool) -> bytes:
    try:
        number = file.fileno()  # type: ignore[attr-defined]
        start = max(0, os.fstat(number).st_size - size) if tail else 0
        return os.pread(number, size, start)
    except (OSError, ValueError):
        return b""
