"""One launch after another: eagerly, in a CUDA graph, and on a side stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...backends import Backend
from ...launch.case import Case, Launch, bind, map_tensors, rebind, tensors
from ...launch.outcome import (
    CYCLES,
    Budget,
    Outcome,
    capture,
    device_of,
    need_cuda,
    outcome,
    poison,
    repeat,
)

SHORTEST, LONGEST = 0.001, 0.02
"""Seconds, about, that an input is late by: what a call needs to return before it is there."""


def serial(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """One launch after the other on the current stream."""
    calls = [bind(backend, cases, launch) for launch in launches]
    checker = budget.checker([c.slot for c in calls])
    pulse = budget.pulse(device_of(cases))

    def once() -> None:
        for call in calls:
            call.enqueue()
            pulse()
        checker.sweep()

    seconds = repeat(once, budget, device_of(cases))
    return outcome(checker, calls, cases, seconds)


def graph(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """One CUDA graph holding the whole chain of different problems, replayed."""
    need_cuda(cases, "CUDA graphs")
    calls = [bind(backend, cases, launch) for launch in launches]
    checker = budget.checker([c.slot for c in calls])

    pulse = budget.pulse(device_of(cases))

    def chain() -> None:
        for call in calls:
            call.enqueue()
        checker.sweep()

    def warm() -> None:
        for call in calls:
            call.enqueue()
            pulse()
        checker.sweep()

    captured = capture(chain, warm)
    seconds = repeat(captured.replay, budget, device_of(cases))
    return outcome(checker, calls, cases, seconds)


def side_stream(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """A side stream whose input arrives late: only the current stream's order makes it right.

    Until a delayed copy on the side stream the activation holds poison, so a kernel launched on
    any other stream reads poison.
    """
    need_cuda(cases, "streams")
    bound = [bind(backend, cases, launch) for launch in launches]
    calls = [
        rebind(backend, cases, call, map_tensors(call.activation, torch.empty_like))
        for call in bound
    ]
    checker = budget.checker([c.slot for c in calls])
    # Listed before the first launch: a backend may keep more in its own activation later.
    late = [
        (tensors(call.activation), tensors(source.activation))
        for call, source in zip(calls, bound, strict=True)
    ]
    side = torch.cuda.Stream()
    held = total = 0
    gate = SHORTEST

    def once() -> None:
        nonlocal held, total, gate
        for waiting, _ in late:
            for each in waiting:
                poison(each)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for call, (waiting, source) in zip(calls, late, strict=True):
                torch.cuda._sleep(int(gate * CYCLES))
                opened = side.record_event()
                for to, origin in zip(waiting, source, strict=True):
                    to.copy_(origin)
                call.enqueue()
                total += 1
                if opened.query():
                    # Many small kernels from a busy host are slow without waiting for anything.
                    gate = min(2 * gate, LONGEST)
                else:
                    held += 1
        torch.cuda.synchronize()
        checker.sweep()

    seconds = repeat(once, budget, device_of(cases))
    proof = {"calls": total, "returned_before_input": held}
    missed = None if held else "every call waited for the GPU before it returned"
    return outcome(checker, calls, cases, seconds, missed, proof)
