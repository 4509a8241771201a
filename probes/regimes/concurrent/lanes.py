"""Several launches at once with the same prepared weight: on streams, in a graph, in threads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from ...backends import Backend
from ...check.sweep import Checker
from ...launch.case import Call, Case, Launch, bind
from ...launch.outcome import (
    CYCLES,
    Budget,
    Outcome,
    capture,
    device_of,
    need_cuda,
    outcome,
    repeat,
)
from ..stamps import LaneStamps

LANES = 4
"""Streams (or threads) at once: what engines use for overlapped layers, and enough to collide."""
ROUNDS = 200
"""Threads with calls too short to overlap every time are sent at most so often until they do."""


def streams(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Several lanes at once with the same prepared weight, launched eagerly."""
    lanes = lanes_of(backend, cases, launches)
    calls = [call for lane in lanes for call in lane]
    checker = Checker([c.slot for c in calls])
    if device_of(cases).type == "cpu":

        def once() -> bool:
            overlapped = run_threads(lanes, lambda lane: nullcontext())
            checker.sweep()
            return overlapped

        seconds, missed, proof = repeat_threads(once, budget, device_of(cases))
        return outcome(checker, calls, cases, seconds, missed, proof)

    side = [torch.cuda.Stream() for _ in lanes]
    stamps = LaneStamps(len(lanes), device_of(cases))
    gate = [0.01]

    def gated() -> None:
        # A closed gate lets the work queue up, so that the lanes overlap on the GPU even where
        # the host enqueues more slowly than the GPU computes.
        torch.cuda._sleep(int(gate[0] * CYCLES))
        start = time.perf_counter()
        _fork_join(lanes, side, stamps)
        gate[0] = min(1.5 * (time.perf_counter() - start), 0.1)
        checker.sweep()
        stamps.count()

    seconds = repeat(gated, budget, device_of(cases))
    proof = {"lanes": "streams", **stamps.proof()}
    missed = None if proof["overlapped"] else "the streams never overlapped on the GPU"
    return outcome(checker, calls, cases, seconds, missed, proof)


def graph_streams(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Several streams at once with the same prepared weight, inside one CUDA graph."""
    need_cuda(cases, "CUDA graphs")
    lanes = lanes_of(backend, cases, launches)
    calls = [call for lane in lanes for call in lane]
    checker = Checker([c.slot for c in calls])
    side = [torch.cuda.Stream() for _ in lanes]
    stamps = LaneStamps(len(lanes), device_of(cases))

    def chain() -> None:
        _fork_join(lanes, side, stamps)
        checker.sweep()
        stamps.count()

    def one_by_one() -> None:
        for call in calls:
            call.enqueue()

    # Warmed without overlap: that belongs to the replay.
    captured = capture(chain, warm=one_by_one)
    seconds = repeat(captured.replay, budget, device_of(cases))
    proof = {"lanes": "graph branches", **stamps.proof()}
    missed = None if proof["overlapped"] else "the graph's branches never overlapped on the GPU"
    return outcome(checker, calls, cases, seconds, missed, proof)


def lanes_of(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch]
) -> list[list[Call]]:
    """Every launch once in each lane, on other rows in each, each starting elsewhere in the chain.

    Lanes share the prepared weight and nothing else: on equal rows, a shared scratch buffer would
    hold what each lane expects, whoever wrote it.
    """
    lanes = []
    for lane in range(LANES):
        shift = lane * len(launches) // LANES
        order = [*launches[shift:], *launches[:shift]]
        lanes.append([bind(backend, cases, _moved(cases, launch, lane)) for launch in order])
    return lanes


def _moved(cases: Sequence[Case], launch: Launch, lane: int) -> Launch:
    """The launch on rows further down the pool, as far as the pool allows."""
    places = cases[launch.case].problem.m - launch.m + 1
    step = max(1, places // LANES)
    return replace(launch, offset=(launch.offset + lane * step) % places)


def _fork_join(
    lanes: Sequence[Sequence[Call]], side: Sequence[torch.cuda.Stream], stamps: LaneStamps
) -> None:
    """Run each lane on its own stream, between two points of the current stream."""
    main = torch.cuda.current_stream()
    fork = main.record_event()
    for index, (lane, stream) in enumerate(zip(lanes, side, strict=True)):
        stream.wait_event(fork)
        with torch.cuda.stream(stream):
            stamps.take(index, 0)
            for call in lane:
                call.enqueue()
            stamps.take(index, 1)
        main.wait_event(stream.record_event())


def repeat_threads(
    once: Callable[[], bool], budget: Budget, device: torch.device
) -> tuple[float, str | None, dict[str, Any]]:
    """`repeat` rounds of threads, and on until one overlapped, `ROUNDS` at most: on a busy host a
    short lane ends before the next thread has begun.

    `once` says whether its round overlapped. Returns seconds, why the regime was not exercised
    (None if it was), and the proof.
    """
    overlaps: list[bool] = []
    start = time.perf_counter()
    repeat(lambda: overlaps.append(once()), budget, device)
    while not any(overlaps) and len(overlaps) < ROUNDS:
        overlaps.append(once())
    seconds = time.perf_counter() - start
    proof = {"lanes": "threads", "rounds": len(overlaps), "overlapped": sum(overlaps)}
    missed = None if any(overlaps) else "no two threads were inside the backend at once"
    return seconds, missed, proof


def run_threads(
    lanes: Sequence[Sequence[Call]], inside: Callable[[int], AbstractContextManager[object]]
) -> bool:
    """Run each lane in a thread of its own; whether two were inside the backend at once.

    A thread enters ``inside(lane)`` first, and no thread launches before all have. What the first
    call to fail raised is raised when all threads have ended.
    """
    barrier = threading.Barrier(len(lanes))
    spans: list[tuple[float, float]] = []
    errors: list[BaseException] = []

    def work(index: int) -> None:
        with inside(index):
            barrier.wait()
            start = time.perf_counter()
            try:
                for call in lanes[index]:
                    call.enqueue()
            except BaseException as error:
                errors.append(error)
            spans.append((start, time.perf_counter()))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(lanes))]
    usual = sys.getswitchinterval()
    # Small calls would else run to their end before the interpreter lets another thread in.
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    if errors:
        raise errors[0]
    spans.sort()
    return any(later[0] < earlier[1] for earlier, later in pairwise(spans))
