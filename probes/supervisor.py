"""The probe's side of a worker: start it, ask it, and end it when it hangs, with all it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .protocol import Channel, Closed, Message, Silent

BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
_KILL_WAIT = 10.0


class WorkerFailed(Exception):
    """The command did not finish. `kind` is how, `doing` the last thing the worker said.

    kinds: ``error`` (the backend raised), ``out of memory``, ``not applicable``, ``no backend``
    (the worker lives on); ``poisoned`` (CUDA context lost), ``crash`` (the process died),
    ``hang`` (silent for too long, killed), after all three of which the worker is gone.
    """

    def __init__(self, kind: str, message: str, doing: str, log: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.doing = doing
        self.log = log

    @property
    def fatal(self) -> bool:
        return self.kind in ("poisoned", "crash", "hang")


class Worker:
    """A worker process in a session of its own, so that its children end with it."""

    def __init__(
        self,
        python: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed by `close`
            prefix="fp4tune-worker-", suffix=".log"
        )
        command_read, command_write = os.pipe()
        event_read, event_write = os.pipe()
        interpreter = python or sys.executable
        try:
            self._process = subprocess.Popen(
                [interpreter, str(BOOTSTRAP), str(command_read), str(event_write)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(command_read, event_write),
                start_new_session=True,
                env={**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"},
            )
        finally:
            os.close(command_read)
            os.close(event_write)
        self._channel = Channel(event_read, command_write)
        self.doing = "starting"

    def ask(
        self,
        do: str,
        silence: float,
        progress: Callable[[str], None] | None = None,
        **arguments: Any,
    ) -> Any:
        """Send a command and wait for its result.

        `silence` is how many seconds without any sign of life count as a hang. Raises
        WorkerFailed; after a fatal one the process and all its children are gone.
        """
        self.doing = do
        try:
            self._channel.send({"do": do, **arguments})
            while True:
                message = self._channel.receive(silence)
                if message.get("event") == "progress":
                    self.doing = str(message.get("text"))
                    if progress:
                        progress(self.doing)
                    continue
                return self._finish(message)
        except Silent:
            self.kill()
            raise self._failure("hang", f"silent for {silence:g} s, killed") from None
        except Closed:
            raise self._failure("crash", self._death()) from None

    def _finish(self, message: Message) -> Any:
        if message.get("event") == "done":
            return message.get("result")
        failure = self._failure(str(message.get("kind")), str(message.get("message")))
        if failure.fatal:
            self.kill()
        raise failure

    def _failure(self, kind: str, message: str) -> WorkerFailed:
        return WorkerFailed(kind, message, self.doing, self.log_tail())

    def _death(self) -> str:
        """How the process ended, in words; reaps it and ends what it left running."""
        try:
            code = self._process.wait(_KILL_WAIT)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its channel and had to be killed"
        self.kill()
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def log_tail(self, size: int = 2000) -> str:
        """The end of what the worker and its backend printed."""
        try:
            with open(self._log.name, "rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - size))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> bool:
        """End the process, its session and every descendant; False if it cannot be killed."""
        for pid in [*descendants(self._process.pid), self._process.pid]:
            _signal(pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(_KILL_WAIT)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Let the worker end by itself, then make sure."""
        self._channel.close()
        deadline = time.monotonic() + 2.0
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        self.kill()
        self._log.close()


def descendants(pid: int) -> list[int]:
    """Every living process started by `pid` or by what it started, from /proc."""
    children: dict[int, list[int]] = {}
    try:
        entries = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    for entry in entries:
        try:
            # The command name is in parentheses and may hold anything, also spaces.
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(entry)
        except (OSError, ValueError, IndexError):
            continue
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _signal(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
