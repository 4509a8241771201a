"""Asking the NVIDIA driver with a deadline: every question goes to a process that may hang alone.

A driver that is wedged never comes back from `nvmlInit`, nor from any later call, and a process
that waits in the kernel may not even be killed. So no process of fp4tune calls NVML but `nvml`,
which is asked over a pipe, killed where it says nothing for `limit` seconds, and never waited for.

`ask` is for commands: one process for all questions of this one. A `Conversation` is a process of
one's own, for who asks again and again and may not wait. Standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import Refused

LIMIT = 5.0
"""Seconds after which a driver that says nothing counts as one that does not answer."""
VARIABLE = "FP4TUNE_DRIVER_SECONDS"
"""Sets another limit, for a node on which NVML takes long to begin."""

_PROGRAM = str(Path(__file__).with_name("nvml.py"))
_LONGEST_LINE = 1 << 20
_PROMPT = 0.2
"""Seconds that a killed process is given to be gone; it is left to itself after that."""


class DriverSilent(Refused):
    """The driver does not answer. The message says so, and what to do."""

    do = (
        "see dmesg for an XID, then reset the GPU (nvidia-smi --gpu-reset) or start the node anew;"
        " what runs on the CPU alone can do without it (--gpu none)"
    )

    def __init__(self, seconds: float) -> None:
        self.sentence = f"the NVIDIA driver does not answer: NVML said nothing for {seconds:g} s"
        super().__init__(f"{self.sentence}; {self.do}")


class NvmlError(Exception):
    """NVML cannot be used, or has no such GPU; the message says why, `kind` as `nvml.Unasked`."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def limit() -> float:
    """Seconds a question may take: `VARIABLE`'s where it is a number from 0.1 to 600, else
    LIMIT."""
    with contextlib.suppress(ValueError):
        seconds = float(os.environ.get(VARIABLE, ""))
        if 0.1 <= seconds <= 600:
            return seconds
    return LIMIT


class Conversation:
    """A process that asks the driver: questions are sent and answers received without waiting.

    A few questions may be under way; `alive` is False once the process has ended, or was told to.
    """

    def __init__(self) -> None:
        path = [entry for entry in sys.path if os.path.isabs(entry)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _PROGRAM, json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._in.fileno(), False)
        os.set_blocking(self._out.fileno(), False)
        self._rest = b""
        self._last = 0
        self._closed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._closed and self._process.poll() is None

    def send(self, question: str, gpu: str | None = None) -> int:
        """Ask, and return the number that the answer will have. Never waits, never raises: who is
        not heard gets no answer."""
        self._last += 1
        line = json.dumps({"id": self._last, "ask": question, "gpu": gpu}) + "\n"
        with contextlib.suppress(OSError, ValueError):
            os.write(self._in.fileno(), line.encode())
        return self._last

    def receive(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        """What was answered since the last call: waits up to `seconds` for the first."""
        lines: list[bytes] = []
        deadline = time.monotonic() + seconds
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):
            poll.register(self._out.fileno(), select.POLLIN)
            while not lines and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                data = os.read(self._out.fileno(), 65536)
                if not data:
                    self.close()  # it ended, or will say nothing any more
                    break
                *lines, self._rest = (self._rest + data).split(b"\n")
                if len(self._rest) > _LONGEST_LINE:
                    self.close()
                    break
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                reply = json.loads(line)
                found += [reply] if isinstance(reply, dict) else []
        return found

    def ask(self, question: str, gpu: str | None, seconds: float) -> Any:
        """The answer. Raises NvmlError, and DriverSilent after `seconds`."""
        deadline = time.monotonic() + seconds
        number = self.send(question, gpu)
        while True:
            left = deadline - time.monotonic()
            for reply in self.receive(left):
                if reply.get("id") == number:
                    if "error" in reply:
                        raise NvmlError(str(reply["kind"]), str(reply["error"]))
                    return reply["answer"]
            if not self.alive:
                raise NvmlError("refused", "the process that asks it ended")
            if left <= 0:
                raise DriverSilent(seconds)

    def close(self) -> None:
        """End it, and never wait for it: a process inside the driver may not end at all."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._process.kill()
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError, ValueError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PROMPT)


class _Shared:
    """The conversation of this process, begun with the first question."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """What a forked child does: the conversation is its parent's."""
        self.lock = threading.Lock()
        self.conversation: Conversation | None = None
        self.silent = False

    def ask(self, question: str, gpu: str | None) -> Any:
        with self.lock:
            seconds = limit()
            if self.silent:
                raise DriverSilent(seconds)
            if self.conversation is None:
                self.conversation = Conversation()
            try:
                return self.conversation.ask(question, gpu, seconds)
            except DriverSilent:
                self.silent = True
                self._end()
                raise
            except NvmlError as error:
                if error.kind == "refused":
                    self._end()  # a driver that was replaced needs its library loaded anew
                raise

    def _end(self) -> None:
        if self.conversation is not None:
            self.conversation.close()
            self.conversation = None

    def close(self) -> None:
        with self.lock:
            self._end()
            self.silent = False


_shared = _Shared()
os.register_at_fork(after_in_child=_shared.forget)


def ask(question: str, gpu: str | None = None) -> Any:
    """The answer of the driver to one of `nvml.QUESTIONS`, from any thread.

    Raises NvmlError where NVML cannot be used or does not know the GPU, and DriverSilent where it
    says nothing for `limit` seconds; then at once for every later question of this process.
    """
    return _shared.ask(question, gpu)


def ask_once(question: str, gpu: str | None = None) -> Any:
    """As `ask`, and without leaving a process behind: for an engine, that asks once."""
    conversation = Conversation()
    try:
        return conversation.ask(question, gpu, limit())
    finally:
        conversation.close()


@atexit.register
def close() -> None:
    """End the process that `ask` began, if any; the next question begins another."""
    _shared.close()
