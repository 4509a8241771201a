"""Backends started without compiling them, at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

from ...probes.worker.supervisor import WorkerFailed
from ..runner import Readied, Runner


def start(pool: Executor, runners: Sequence[Runner]) -> Readied:
    """Start these backends; those that could be."""
    started = Readied()
    for runner, future in [(runner, pool.submit(runner.start)) for runner in runners]:
        try:
            future.result()
        except WorkerFailed as failure:
            started.failed[runner.name] = ("starting", failure)
            continue
        started.runners.append(runner)
    return started
