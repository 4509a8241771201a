"""The probe's side of a worker: start it, ask it, and end it when it hangs, with all it started."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from ...machine import memory
from .keeper import KILL_SECONDS
from .nursery import Start, nursery, settings
from .protocol import Channel, Closed, Message, Silent

_KILL_WAIT = KILL_SECONDS
_LOOK = 0.5
"""Seconds between two looks at whether a silent worker still lives."""
_ANSWERS = 2.0
"""Seconds a keeper has to say what it knows."""
_STARTS = 180.0
"""Seconds a process has to begin; a fork server may be importing torch."""
_GOES = 2.0
"""Seconds a worker has to end by itself."""


class WorkerFailed(Exception):
    """The command did not finish. `kind` is how, `doing` the last thing the worker said.

    kinds: ``error`` (the backend raised), ``internal`` (we did: says nothing of the backend),
    ``out of memory``, ``not applicable``, ``no backend`` (the worker lives on); ``late`` (not done
    in the time there was, and killed for that); ``poisoned``
    (CUDA context lost), ``crash`` (the process died), ``hang`` (silent for too long, killed),
    after all three of which the worker is gone. `gone`: it is after another, too, since the kernel
    ended it to get its memory back.
    """

    def __init__(
        self, kind: str, message: str, doing: str, log: str = "", gone: bool = False
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.doing = doing
        self.log = log
        self.gone = gone

    @property
    def fatal(self) -> bool:
        return self.gone or self.kind in ("poisoned", "crash", "hang")


class Worker:
    """A worker process in a session of its own, with a keeper, so that all it starts ends with it.

    It is forked from a process that has imported torch where that can be (see `nursery`), and is an
    interpreter of its own with `python`, with `alone`, or with an `environment` that has to be
    there when a process begins. Not thread-safe.
    """

    def __init__(
        self,
        python: str | None = None,
        environment: Mapping[str, str] | None = None,
        alone: bool = False,
    ) -> None:
        command_read, command_write = os.pipe()
        event_read, event_write = os.pipe()
        secret = secrets.token_hex(16)
        self._channel = Channel(event_read, command_write, expects=secret.encode())
        try:
            self._kept = nursery.start(Start(python, environment, alone), command_read, event_write)
        except BaseException:
            self._channel.close()
            raise
        finally:
            os.close(command_read)
            os.close(event_write)
        self._asked = 0
        self._kills = memory.kills()
        self.doing = "starting"
        with contextlib.suppress(Closed):  # then asking it will say so
            # Into an empty pipe: it is read before the worker imports anything of anybody's.
            self._channel.send({"secret": secret, "settings": settings()})

    def ask(
        self,
        do: str,
        silence: float,
        progress: Callable[[str], None] | None = None,
        until: float = inf,
        **arguments: Any,
    ) -> Any:
        """Send a command and wait for its result, `until` then (of `time.monotonic`) at most.

        `silence` is how many seconds without any sign of life count as a hang, from when the
        process runs. What is printed or written to the channel by anyone but the worker's own loop
        is no sign of life. Raises
        WorkerFailed; after a fatal one the process and all its children are gone.
        """
        self.doing = do
        self._asked += 1
        number = self._asked
        try:
            # Until it runs nobody's silence is meant, and it may have to be started again.
            if not self._kept.started(_STARTS) and self.alive:
                raise Silent("it was not started")
            self._channel.send({"id": number, "do": do, "arguments": arguments}, silence)
            while True:
                message = self._receive(number, min(silence, until - time.monotonic()))
                if message["event"] != "progress":
                    return self._finish(message)
                self.doing = str(message.get("text"))
                if progress:
                    progress(self.doing)
        except Silent:
            ran = self._kept.pid is not None
            self.kill()
            if time.monotonic() >= until:
                why = "not done in the time there was, and killed"
                raise WorkerFailed("late", why, self.doing, self.log_tail(), gone=True) from None
            how = f"silent for {silence:g} s" if ran else f"not started within {_STARTS:g} s"
            raise self._failure("hang", f"{how}, killed") from None
        except Closed:
            died = self._death()
            log, why = self.log_tail(), None
            if self._kept.status == -signal.SIGKILL and memory.kills() != self._kills:
                why = "ended by the kernel, which had no memory left"
            elif memory.ended_for_want(log, self._kept.status):
                why = f"{died}: this host had no memory or no thread left"
            if why is not None:
                raise WorkerFailed("out of memory", why, self.doing, log, gone=True) from None
            raise self._failure("crash", died) from None

    def _receive(self, number: int, silence: float) -> Message:
        """The next message about command `number`. A child that the worker left behind may hold
        the channel open, so its end is not enough to go by."""

        def mine(message: Message) -> bool:
            return message.get("id") == number and message.get("event") in _EVENTS

        deadline = time.monotonic() + silence
        while True:
            alive = self.alive  # asked first: what it sent before it died is still to be read
            left = max(0.0, deadline - time.monotonic())
            try:
                return self._channel.receive(min(left, _LOOK), mine)
            except Silent:
                if not alive:
                    raise Closed("the worker is gone") from None
                if left <= _LOOK:
                    raise

    def _finish(self, message: Message) -> Any:
        if message["event"] == "done":
            return message.get("result")
        failure = self._failure(str(message.get("kind")), str(message.get("message")))
        if failure.fatal:
            self.kill()
        raise failure

    def _failure(self, kind: str, message: str) -> WorkerFailed:
        return WorkerFailed(kind, message, self.doing, self.log_tail())

    def _death(self) -> str:
        """How the process ended, in words; what it left running is ended, too."""
        if not self._kept.ended(_KILL_WAIT):
            self.kill()
            return "closed its channel and had to be killed"
        self._channel.close()
        code = self._kept.status
        if self._kept.pid is None:
            return "was not started: the process that was to start it ended"
        if code is None:
            return "ended unseen, with the process that keeps it"
        if code < 0:
            return f"ended by {_signal_name(-code)}"
        said = self.log_tail().strip().splitlines()
        return f"exited with code {code}" + (f"; it last said: {said[-1][:200]}" if said else "")

    def log_tail(self, size: int = 2000) -> str:
        """The end of what the worker and its backend printed."""
        return self._kept.log(_ANSWERS)[-size:]

    @property
    def alive(self) -> bool:
        return not self._kept.ended()

    @property
    def pid(self) -> int | None:
        """Its process id, waiting a while for it to be started; None where it was not."""
        self._kept.started(_STARTS)
        return self._kept.pid

    @property
    def alone(self) -> str | None:
        """Why it is an interpreter of its own, and not forked from one that had torch; None if it
        is forked. Waits for it to be started."""
        self._kept.started(_STARTS)
        return None if self._kept.forked else self._kept.why or "it was asked for"

    def kill(self) -> bool:
        """End the process and everything it started; False if something cannot be killed."""
        gone = self._kept.end(_KILL_WAIT + _ANSWERS)
        self._channel.close()
        return gone

    def close(self) -> None:
        """Let the worker end by itself, then make sure."""
        self._channel.close()
        if not self._kept.ended(_GOES):
            self.kill()
        self._kept.close()


_EVENTS = ("progress", "done", "failed")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
