"""Another process on the same GPU: arithmetic and memory traffic while launches run."""

from __future__ import annotations

import atexit
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ...backends import Backend
from ...check.sweep import Checker
from ...launch.case import Case, Launch, bind
from ...launch.outcome import Budget, NotApplicable, Outcome, device_of, need_cuda, outcome, repeat
from ...problem import Device
from ._neighbour import END, GO, PAUSE, SIZE

_START = 300.0
"""Seconds for a process to load torch and open the device."""
_SWITCH = 20.0
"""Seconds for it to get a round done on a GPU and a host that others use, too."""
_ONE_ONLY = ("exclusive", "busy or unavailable")
_SCRIPT = Path(__file__).with_name("_neighbour.py")


class Neighbour:
    """A process that keeps `device` (``cpu``, ``cuda:0``) busy while `go` holds.

    It is a child of its worker, and ends with that as whatever a worker started does; it also
    looks, between two rounds, whether the process that started it is there.
    """

    def __init__(self, device: str) -> None:
        fd = os.memfd_create("fp4tune-neighbour")
        os.ftruncate(fd, SIZE)
        self._shared = mmap.mmap(fd, SIZE)
        struct.pack_into("qq", self._shared, 0, PAUSE, -1)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), str(fd), device, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(fd,),
        )
        os.close(fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def rounds(self) -> int:
        """Rounds of work finished; -1 until it can begin."""
        return int(struct.unpack_from("q", self._shared, 8)[0])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def tell(self, order: int) -> None:
        struct.pack_into("q", self._shared, 0, order)

    def wait_past(self, rounds: int, seconds: float, beat: Callable[[], None]) -> bool:
        """Wait until more than `rounds` are finished; False if that does not come."""
        deadline = time.monotonic() + seconds
        next_beat = 0.0
        while self.rounds <= rounds:
            if not self.alive or time.monotonic() > deadline:
                return False
            if time.monotonic() > next_beat:
                beat()
                next_beat = time.monotonic() + 1
            time.sleep(0.002)
        return True

    def last_words(self) -> str:
        """The last line it printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"

    def end(self) -> None:
        """Kill it and wait for it."""
        self.tell(END)
        self._process.kill()
        self._process.wait()
        self._log.close()


_running: dict[str, Neighbour] = {}
"""By device: one is kept, paused, since opening a GPU takes seconds."""


@atexit.register
def _end_all() -> None:
    while _running:
        _running.popitem()[1].end()


def start_neighbour(device: Device) -> None:
    """Start the process that `neighbours` needs, paused; where one is running, nothing is done."""
    if device.kind == "cuda":
        _running_neighbour(f"cuda:{device.index}")


def settled(beat: Callable[[], None]) -> None:
    """Wait until every process that was started has opened its device, or died over it."""
    for other in _running.values():
        other.wait_past(-1, _START, beat)


def _running_neighbour(name: str) -> Neighbour:
    other = _running.get(name)
    if other is None or not other.alive:
        other = _running[name] = Neighbour(name)
    return other


def neighbours(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Launches on one stream while a second process multiplies and copies on the same GPU.

    The GPU switches between the two: kernels that assume that all their blocks, or both of two
    launches, are resident at once meet another schedule. Exercised where the other process finished
    work during the launches.
    """
    need_cuda(cases, "other processes' kernels")
    calls = [bind(backend, cases, launch) for launch in launches]
    checker = Checker([call.slot for call in calls])
    device = device_of(cases)
    name = f"cuda:{device.index or 0}"
    other = _running_neighbour(name)
    try:
        if not other.wait_past(-1, _START, budget.beat):
            return _not_started(other, name)
        other.tell(GO)
        other.wait_past(other.rounds, 5.0, budget.beat)
        before = other.rounds

        def once() -> None:
            for call in calls:
                call.enqueue()
            checker.sweep()

        seconds = repeat(once, budget, device)
        if other.rounds == before:
            # Too short to be switched in between: for as long as one round of the neighbour.
            end = time.monotonic() + _SWITCH
            while other.rounds == before and other.alive and time.monotonic() < end:
                seconds += repeat(once, Budget(1, 16, 0.05, budget.beat), device)
        done = other.rounds - before
    finally:
        other.tell(PAUSE)
    missed = None if done else "the other process finished no work meanwhile"
    return outcome(checker, calls, cases, seconds, missed, {"neighbour_rounds": done})


def _not_started(other: Neighbour, name: str) -> Outcome:
    """What to say where the other process cannot start."""
    words = other.last_words()
    other.end()
    _running.pop(name, None)
    if any(text in words for text in _ONE_ONLY):
        raise NotApplicable("this GPU takes one process at a time")
    return Outcome(0, (), 0, 0.0, not_exercised=f"the other process did not start: {words}")
