"""Backends started and compiled, at once as far as memory goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Semaphore

from ...cache import state
from ...machine.memory import free_memory
from ...probes.problem import Problem
from ...probes.worker.supervisor import WorkerFailed
from ..runner import Runner
from ..verdict.buckets import ranges

_GIB = 1 << 30
_BUILD_BYTES = 2 * _GIB
"""Memory a compiler may take: builds run in parallel only as far as this fits."""


@dataclass(slots=True)
class Built:
    """What came of starting and compiling backends."""

    runners: list[Runner] = field(default_factory=list)
    """Those that worked."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By backend, of those that were compiled."""
    failed: dict[str, tuple[str, WorkerFailed]] = field(default_factory=dict)
    """By backend: what it was doing, and how it failed."""


def start(pool: Executor, runners: Sequence[Runner]) -> Built:
    """Start these backends without compiling them."""
    built = Built()
    for runner, future in [(runner, pool.submit(runner.start)) for runner in runners]:
        try:
            future.result()
        except WorkerFailed as failure:
            built.failed[runner.name] = ("starting", failure)
            continue
        built.runners.append(runner)
    return built


def build(
    pool: Executor,
    wanted: Mapping[Runner, Sequence[Problem]],
    state_dir: Path,
    done: Callable[[str, str], None],
) -> Built:
    """Start these backends and compile what is `wanted` of each; `done` is told of each.

    Two probes never compile one backend at once: the second finds what the first has made.
    """
    room = max(1, free_memory() // _BUILD_BYTES)
    cores = len(os.sched_getaffinity(0))
    # Few backends have much to compile, so a half each keeps the machine busy to the end.
    workers = max(1, min(cores, room) // min(2, max(1, len(wanted))))
    room_for = Semaphore(min(len(wanted), room) or 1)

    def one(runner: Runner, problems: Sequence[Problem]) -> float:
        lock = state.build_lock(state_dir, f"{runner.target.device.arch}-{runner.name}")
        what = f"the build of {runner.name}"
        each_m = [problem.at(m.hi) for problem in problems for m in ranges(problem.m)]
        with state.exclusive(lock, what, wait=runner.patience.build), room_for:
            return runner.build(each_m, workers)

    built = Built()
    futures = [(runner, pool.submit(one, runner, mine)) for runner, mine in wanted.items()]
    for runner, future in futures:
        try:
            seconds = future.result()
        except WorkerFailed as failure:
            built.failed[runner.name] = ("building", failure)
            continue
        done(runner.name, f"built in {seconds:.1f} s")
        built.seconds[runner.name] = seconds
        built.runners.append(runner)
    return built
