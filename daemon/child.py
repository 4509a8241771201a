"""A child process of the daemon, with all it starts: begun, looked after, and ended within moments.

Everything a child starts inherits a mark in its environment, so that it is found whoever adopts it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from ..probes.worker.supervisor import marked

MARK = "FP4TUNE_DAEMON_CHILD"
_TAIL = 4000
_SWEEPS = 20


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
        self.mark = secrets.token_hex(8)
        self.started = time.monotonic()
        self.ended: str | None = None
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._in = tempfile.TemporaryFile()  # noqa: SIM115
        self._in.write(say)
        self._in.seek(0)
        own = [sys.executable, "-m", "fp4tune.daemon.beside", str(os.getpid()), str(nice), module]
        self._process = subprocess.Popen(
            [*own, *arguments],
            stdin=self._in,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
            env={**environ, MARK: self.mark},
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
        """Every living process of this child's, itself included."""
        return marked(MARK, self.mark)

    def end(self, why: str) -> None:
        """Kill it with all it started; does not wait. `left` says what is still there."""
        if self.ended is None:
            self.ended = why
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for _ in range(_SWEEPS):
            # Until a sweep finds nothing new: a process may start another while it is looked for.
            left = self.family()
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                break
            time.sleep(0.005)

    def left(self) -> list[int]:
        """Processes that are still there, the child's own first if it is."""
        own = [self._process.pid] if self._process.poll() is None else []
        return own + [pid for pid in self.family() if pid not in own]

    def rss(self) -> int:
        """Resident bytes of all its processes; shared pages count in each."""
        return sum(_rss(pid) for pid in self.family())

    def output(self) -> bytes:
        return _read(self._out, 1 << 20, False)

    def said(self) -> str:
        """The last line it wrote on stderr."""
        lines = _read(self._err, _TAIL, True).decode(errors="replace").strip().splitlines()
        return lines[-1][:400] if lines else ""

    def close(self) -> None:
        for file in (self._out, self._err, self._in):
            file.close()


def _rss(pid: int) -> int:
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        open(f"/proc/{pid}/statm", "rb") as file,
    ):
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _read(file: object, size: int, tail: bool) -> bytes:
    try:
        number = file.fileno()  # type: ignore[attr-defined]
        start = max(0, os.fstat(number).st_size - size) if tail else 0
        return os.pread(number, size, start)
    except (OSError, ValueError):
        return b""
