"""Every m there is, once: a fault of shape may sit at a single one."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from ...backends import Backend
from ...check.sweep import Checker
from ...launch.case import Call, Case, Launch, bind
from ...launch.outcome import Budget, Outcome, device_of, outcome, wait

TRIED_FIRST = 32
"""Launches whose first calls are timed before the rest is made."""
SLOW_S = 5e-3
"""A backend whose first call of a new m takes the host longer than this plans or compiles for it:
then no more than `SAMPLED` of them are run."""
SAMPLED = 128
UPWARDS = 1024
"""Up to here all are launched upwards and downwards as well: what a larger m left behind shows."""


def every_m(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Each launch once in a random order; where m is small, once more upwards and downwards."""
    shuffled = list(launches)
    random.Random(len(launches)).shuffle(shuffled)
    calls = [bind(backend, cases, launch) for launch in shuffled]
    device = device_of(cases)
    start = time.perf_counter()
    first: list[float] = []
    for call in calls[:TRIED_FIRST]:
        before = time.perf_counter()
        call.enqueue()
        first.append(time.perf_counter() - before)
    wait(device)
    proof: dict[str, Any] = {"ms": [min(x.m for x in launches), max(x.m for x in launches)]}
    graded: tuple[dict[str, Any], ...] = ()
    host = median(first)
    if host > SLOW_S and len(calls) > SAMPLED:
        calls = calls[:SAMPLED]
        proof["sampled"] = len(calls)
        message = (
            f"a first call of a new m takes the host {1e3 * host:.0f} ms: {len(calls)} of "
            f"{len(launches)} m were run"
        )
        graded = ({"kind": "plan per m", "message": message, "m": calls[0].launch.m},)
    checker = Checker([call.slot for call in calls])
    for order in _orders(calls):
        for done, call in enumerate(order):
            call.enqueue()
            if done % 256 == 255:
                wait(device)
                budget.beat()
        checker.sweep()
    wait(device)
    found = outcome(checker, calls, cases, time.perf_counter() - start, None, proof)
    return Outcome(
        found.repeats,
        found.reports,
        found.changed_inputs,
        found.seconds,
        proof=found.proof,
        graded=graded,
    )


def _orders(calls: Sequence[Call]) -> list[list[Call]]:
    upwards = sorted(calls, key=lambda call: call.launch.m)
    if upwards[-1].launch.m > UPWARDS:
        return [list(calls)]
    return [list(calls), upwards, upwards[::-1]]
