"""The probe's side of a worker: start it, ask it, and end it when it hangs, with all it started."""

from __future__ import annotations

import contextlib
import os
import secrets
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
MARK = "FP4TUNE_WORKER"
"""A variable that a worker and all it starts inherit: they are found whoever adopts them."""
_KILL_WAIT = 10.0
_LOOK = 0.5
"""Seconds between two looks at whether a silent worker still lives."""
_SWEEPS = 50


class WorkerFailed(Exception):
    """The command did not finish. `kind` is how, `doing` the last thing the worker said.

    kinds: ``error`` (the backend raised), ``internal`` (we did: says nothing of the backend),
    ``out of memory``, ``not applicable``, ``no backend`` (the worker lives on); ``poisoned``
    (CUDA context lost), ``crash`` (the process died), ``hang`` (silent for too long, killed),
    after all three of which the worker is gone.
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
    """A worker process in a session of its own, marked, so that all it starts ends with it."""

    def __init__(
        self,
        python: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._mark = secrets.token_hex(8)
        # Without a name, so that nothing is left of it however this process ends.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
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
                env={
                    **os.environ,
                    **(environment or {}),
                    "PYTHONUNBUFFERED": "1",
                    MARK: self._mark,
                },
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
                message = self._receive(silence)
                event = message.get("event")
                if event == "progress":
                    self.doing = str(message.get("text"))
                    if progress:
                        progress(self.doing)
                elif event in ("done", "failed"):
                    return self._finish(message)
        except Silent:
            self.kill()
            raise self._failure("hang", f"silent for {silence:g} s, killed") from None
        except Closed:
            raise self._failure("crash", self._death()) from None

    def _receive(self, silence: float) -> Message:
        """The next message. A child that the worker left behind may hold the channel open, so its
        end is not enough to go by."""
        deadline = time.monotonic() + silence
        while True:
            alive = self.alive  # asked first: what it sent before it died is still to be read
            left = max(0.0, deadline - time.monotonic())
            try:
                return self._channel.receive(min(left, _LOOK))
            except Silent:
                if not alive:
                    raise Closed("the worker is gone") from None
                if left <= _LOOK:
                    raise

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
            return f"ended by {_signal_name(-code)}"
        said = self.log_tail().strip().splitlines()
        return f"exited with code {code}" + (f"; it last said: {said[-1][:200]}" if said else "")

    def log_tail(self, size: int = 2000) -> str:
        """The end of what the worker and its backend printed."""
        try:
            log = self._log.fileno()
            start = max(0, os.fstat(log).st_size - size)
            return os.pread(log, size, start).decode(errors="replace")
        except (OSError, ValueError):
            return ""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> bool:
        """End the process and everything it started; False if something cannot be killed."""
        for _ in range(_SWEEPS):
            # Until a sweep finds nothing: a process may start another while it is being looked for.
            if self.alive:
                self._process.kill()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            left = marked(MARK, self._mark)
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                break
            time.sleep(0.01)
        self._channel.close()
        try:
            self._process.wait(_KILL_WAIT)
        except subprocess.TimeoutExpired:
            return False
        return not left

    def close(self) -> None:
        """Let the worker end by itself, then make sure."""
        self._channel.close()
        deadline = time.monotonic() + 2.0
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        self.kill()
        self._log.close()


def marked(variable: str, mark: str) -> list[int]:
    """Every living process in whose environment `variable` is `mark`, from /proc."""
    wanted = f"{variable}={mark}".encode()
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                # It may be gone by now, or another user's; a zombie has no environment.
                with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
                    if wanted in environ.read().split(b"\0"):
                        found.append(int(name))
    return found


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
