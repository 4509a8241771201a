"""Several host threads on a GPU, each on a stream of its own, with the same prepared weight."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ...backends import Backend
from ...launch.case import Case, Launch
from ...launch.outcome import CYCLES, Budget, NotApplicable, Outcome, device_of, outcome
from .lanes import (
    LANES,
    Together,
    calls_of,
    kinds_of,
    repeat_threads,
    rounds_of,
    run_threads,
)


def threads(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Each lane of `streams` launched by a host thread of its own, all at once.

    The streams open together, so that the lanes overlap on the device as well. What breaks here and
    not in `streams` is state on the host: a plan, a workspace or a "current" handle kept between
    two steps of a call.
    """
    device = device_of(cases)
    if device.type != "cuda":
        raise NotApplicable("a CPU has the threads already in the streams regime")
    rounds = rounds_of(backend, cases, launches)
    calls = calls_of(rounds)
    checker = budget.checker([c.slot for c in calls])
    side = [torch.cuda.Stream(device) for _ in range(LANES)]
    gate = [0.01]

    def once() -> frozenset[str]:
        torch.cuda._sleep(int(gate[0] * CYCLES))
        start = time.perf_counter()
        overlapped = _launch_in_threads(rounds, side, device)
        gate[0] = min(1.5 * (time.perf_counter() - start), 0.05)
        checker.sweep()
        return overlapped

    seconds, missed, proof = repeat_threads(once, kinds_of(rounds), budget, device)
    return outcome(checker, calls, cases, seconds, missed, proof)


def _launch_in_threads(
    rounds: Sequence[Together], side: Sequence[torch.cuda.Stream], device: torch.device
) -> frozenset[str]:
    """Run every lane in a thread, between two points of the current stream; what overlapped."""
    main = torch.cuda.current_stream(device)
    fork = main.record_event()

    @contextmanager
    def inside(lane: int) -> Iterator[None]:
        # A new thread has no current device or stream of its own yet.
        with torch.cuda.device(device), torch.cuda.stream(side[lane]):
            side[lane].wait_event(fork)
            yield

    try:
        return run_threads(rounds, inside)
    finally:
        for stream in side:
            main.wait_stream(stream)
