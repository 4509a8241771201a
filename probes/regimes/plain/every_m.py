"""Every m there is, once: a fault of shape may sit at a single one."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from ...backends import Backend
from ...check.sweep import Checker
from ...launch.case import Call, Case, Launch, bind
from ...launch.outcome import Budget, Outcome, device_of, outcome, wait

TRIED_FIRST = 32
"""Launches whose first calls are timed before the rest is made."""
SLOW_S = 5e-3
"""A backend whose first call of a new m takes the host so much longer than the second plans or
compiles for it: then no more than `SAMPLED` of them are run."""
SAMPLED = 128
_QUEUED = 256
"""Launches after which the device is waited for."""
UPWARDS = 1024
"""Up to here all are launched upwards and downwards as well: what a larger m left behind shows."""


def every_m(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Each launch once in a random order; where m is small, once more upwards and downwards.

    Ends with the time, too: those that were made by then are all there is.
    """
    shuffled = list(launches)
    random.Random(len(launches)).shuffle(shuffled)
    device = device_of(cases)
    start = time.perf_counter()
    calls, host = _first_calls(backend, cases, shuffled, budget)
    checker = Checker([call.slot for call in calls])
    checker.sweep()
    for order in _up_and_down(calls):
        if time.perf_counter() - start > budget.seconds:
            break
        for done, call in enumerate(order):
            call.enqueue()
            if done % _QUEUED == _QUEUED - 1:
                wait(device)
                budget.beat()
        checker.sweep()
    wait(device)
    proof: dict[str, Any] = {"ms": [min(x.m for x in launches), max(x.m for x in launches)]}
    graded: tuple[dict[str, Any], ...] = ()
    if len(calls) < len(launches):
        proof["sampled"] = len(calls)
    if host > SLOW_S and len(launches) > SAMPLED:
        message = (
            f"a first call of a new m takes the host {1e3 * host:.0f} ms: {len(calls)} of "
            f"{len(launches)} m were run"
        )
        graded = ({"kind": "plan per m", "message": message, "m": calls[0].launch.m},)
    found = outcome(checker, calls, cases, time.perf_counter() - start, None, proof)
    return replace(found, graded=graded)


def _first_calls(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> tuple[list[Call], float]:
    """The launches, made in their order until the time is over; no more than `SAMPLED` where the
    first call of an m takes the host long. How much longer than the next (seconds, the median)."""
    device, end = device_of(cases), time.perf_counter() + budget.seconds
    calls: list[Call] = []
    more: list[float] = []
    for launch in launches:
        slow = len(more) == TRIED_FIRST and median(more) > SLOW_S
        if (slow and len(calls) >= SAMPLED) or (calls and time.perf_counter() > end):
            break
        call = bind(backend, cases, launch)
        if len(more) < TRIED_FIRST:
            first, second = _seconds_of(call), _seconds_of(call)
            more.append(first - second)
        else:
            call.enqueue()
        calls.append(call)
        if len(calls) % _QUEUED == 0:
            wait(device)
            budget.beat()
    wait(device)
    return calls, median(more)


def _seconds_of(call: Call) -> float:
    start = time.perf_counter()
    call.enqueue()
    return time.perf_counter() - start


def _up_and_down(calls: Sequence[Call]) -> list[list[Call]]:
    upwards = sorted(calls, key=lambda call: call.launch.m)
    return [] if upwards[-1].launch.m > UPWARDS else [upwards, upwards[::-1]]
