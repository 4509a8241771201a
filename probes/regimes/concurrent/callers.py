"""Calls of many callers, one after the other: each of a new thread, on a GPU on a new stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from ...backends import Backend
from ...check.sweep import Checker
from ...launch.case import Call, Case, Launch, bind
from ...launch.outcome import Budget, Outcome, device_of, outcome, repeat

_PRIORITIES = (0, -1)


MOST_MORE = 50
"""Rounds more, at most, until a thread has the number of one before it."""


def callers(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every launch by a thread that is new and ends with it; none overlap.

    On a GPU each has a stream of its own, every second one of high priority, and one more thread
    makes all launches, each on a new stream. What is kept by thread or by stream is missing then,
    or is that of a caller which is gone. Exercised where a thread's number came again.
    """
    device = device_of(cases)
    calls = [bind(backend, cases, launch) for launch in launches]
    checker = Checker([call.slot for call in calls])
    numbers: list[int] = []
    streams = 0

    def once() -> None:
        nonlocal streams
        for index, call in enumerate(calls):
            numbers.append(_in_a_thread([call], device, index))
        checker.sweep()
        if device.type == "cuda":
            numbers.append(_in_a_thread(calls, device, 0))
            checker.sweep()
            streams += 2 * len(calls)

    seconds = repeat(once, budget, device)
    for _ in range(MOST_MORE):
        if len(numbers) > len(set(numbers)):
            break
        once()  # a busy system may give each thread a number of its own for a while
    again = len(numbers) - len(set(numbers))
    proof = {"threads": len(numbers), "numbers_that_came_again": again, "streams": streams}
    missed = None if again else "no thread had the number of one before it"
    return outcome(checker, calls, cases, seconds, missed, proof)


def _in_a_thread(calls: Sequence[Call], device: torch.device, first: int) -> int:
    """Make the calls in a new thread, each on a stream of its own; the thread's number."""
    errors: list[BaseException] = []
    numbers: list[int] = []

    def work() -> None:
        numbers.append(threading.get_ident())
        try:
            for index, call in enumerate(calls, first):
                if device.type == "cpu":
                    call.enqueue()
                else:
                    _on_a_stream(call, device, _PRIORITIES[index % len(_PRIORITIES)])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return numbers[0]


def _on_a_stream(call: Call, device: torch.device, priority: int) -> None:
    """Make the call on a new stream, behind what the default one has to do, and before the rest."""
    main = torch.cuda.default_stream(device)
    stream = torch.cuda.Stream(device, priority=priority)
    stream.wait_stream(main)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        call.enqueue()
        if torch.cuda.current_stream(device) != stream:
            raise RuntimeError("a call left another stream the current one")
    main.wait_stream(stream)
