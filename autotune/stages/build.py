"""Backends compiled, at once as far as memory goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from math import inf
from pathlib import Path
from threading import Semaphore

from ...cache import state
from ...cache.errors import Busy
from ...machine.memory import free_memory
from ...probes.problem import Problem
from ...probes.worker.supervisor import WorkerFailed
from ..runner import Readied, Runner

_GIB = 1 << 30
_BUILD_BYTES = 2 * _GIB
"""Memory a compiler may take: builds run in parallel only as far as this fits."""
SAID = 60.0
"""Seconds after which it is said what is still being compiled."""


def build(
    pool: Executor,
    wanted: Mapping[Runner, Sequence[Problem]],
    state_dir: Path,
    say: Callable[[str, str], None],
    until: float = inf,
) -> Readied:
    """Start these backends and compile what is `wanted` of each, at these m; `say` is told of
    each, and every minute what is waited for.

    Two probes never compile one backend at once: the second finds what the first has made. What is
    not compiled `until` then (of `time.monotonic`) is given up, its worker ended.
    """
    fit = max(1, free_memory() // _BUILD_BYTES)
    cores = len(os.sched_getaffinity(0))
    # Few backends have much to compile, so a half each keeps the machine busy to the end.
    workers = max(1, min(cores, fit) // min(2, max(1, len(wanted))))
    room_for = Semaphore(min(len(wanted), fit) or 1)

    def one(runner: Runner, problems: Sequence[Problem]) -> float:
        lock = state.build_lock(state_dir, f"{runner.target.device.arch}-{runner.name}")
        what = f"the build of {runner.name}"
        try:
            with state.exclusive(lock, what, wait=min(runner.patience.build, left())), room():
                return runner.build(problems, workers, until)
        except Busy:
            if left():
                raise
            raise _late() from None

    def left() -> float:
        return max(0.0, until - time.monotonic())

    @contextmanager
    def room() -> Iterator[None]:
        if not room_for.acquire(timeout=left() if until < inf else None):
            raise _late()
        try:
            yield
        finally:
            room_for.release()

    built = Readied()
    futures = {pool.submit(one, runner, mine): runner for runner, mine in wanted.items()}
    for future in _as_they_end(futures, say):
        runner = futures[future]
        try:
            seconds = future.result()
        except WorkerFailed as failure:
            built.failed[runner.name] = ("building", failure)
        else:
            say(runner.name, f"built in {seconds:.1f} s")
            built.seconds[runner.name] = seconds
    built.runners.extend(runner for runner in wanted if runner.name in built.seconds)
    return built


def _late() -> WorkerFailed:
    return WorkerFailed("late", "its turn to compile did not come in half of --budget", "building")


def _as_they_end(
    futures: Mapping[Future[float], Runner], say: Callable[[str, str], None]
) -> Iterator[Future[float]]:
    """Each once it is done; what is waited for is said now and then."""
    left, begun = set(futures), time.monotonic()
    while left:
        ended, left = wait(left, SAID, FIRST_COMPLETED)
        yield from ended
        if not ended:
            names = ", ".join(sorted(futures[future].name for future in left))
            say("build", f"{time.monotonic() - begun:.0f} s, compiling {names}")
