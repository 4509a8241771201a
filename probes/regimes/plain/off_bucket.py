"""Many different m, each once and in random order: plans, workspaces, leaks and host time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from ... import census
from ...backends import Backend
from ...check.sweep import Checker, slot_bytes
from ...launch.case import Call, Case, Launch, bind, with_room
from ...launch.outcome import CYCLES, Budget, Outcome, device_of, outcome, wait
from ..leaks import CallSeries, leaks, live_bytes, open_handles

MOST = 48
"""Different m in one run."""
_BYTES = 256 << 20
"""Memory for the outputs of m that were not asked for, at most."""
_PASSES = 8
_LONG = 0.05
"""Seconds of calls after which it is told that they are made."""
_LONGEST_GAP = 0.02
"""Seconds behind a call, at most, in which nothing is called: who takes memory then is another."""
PLAN_SECONDS = 0.005
"""A first call of an m that takes this much longer than the second prepares something for it."""


def off_bucket(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every m of every item's range that there is time for, each once, then all once more.

    After the largest m of each item has run, memory is read before and after every call; see
    `leaks`. On a GPU some calls are made behind a closed gate: one that returns only when it opens
    has waited for the device (`host sync`, a grade).
    """
    device = device_of(cases)
    rng = random.Random(len(launches))
    chosen = spread_over_m(cases, launches, rng)
    calls = [bind(backend, cases, launch) for launch in chosen]
    checker = Checker([call.slot for call in calls])
    start = time.perf_counter()
    largest: dict[int, Call] = {}
    for call in calls:
        other = largest.get(call.launch.item)
        if other is None or call.launch.m > other.launch.m:
            largest[call.launch.item] = call
    warm = sorted(largest.values(), key=lambda call: -call.launch.m)
    for call in [*warm, *warm]:
        call.enqueue()
        budget.beat()
    first = [call for call in calls if largest[call.launch.item] is not call]
    rng.shuffle(first)
    new = _call_each(first, device, checker, budget.beat)
    known: list[CallSeries] = []
    while len(known) < 2 or (
        len(known) < min(budget.most, _PASSES) and time.perf_counter() - start < budget.seconds
    ):
        known.append(_call_each(rng.sample(calls, len(calls)), device, checker, budget.beat))
        budget.beat()
    # The first of them makes the second call of each m, which may still settle something.
    errors, proof = leaks(new, known[1:], len(first))
    if errors:
        # An allocator's own records may grow for a while, and then they stop: looked at for longer,
        # and without what CUPTI keeps of each launch in a process that took a census.
        wait(device)
        census.leave()
        later = []
        for _ in range(_PASSES):
            later.append(_call_each(rng.sample(calls, len(calls)), device, checker, budget.beat))
            budget.beat()
        errors, proof = leaks(new, later, len(first))
    graded: list[dict[str, Any]] = []
    if first:
        graded += _plan_times(new, known[0], proof)
    if device.type == "cuda":
        graded += _host_syncs(warm, proof)
        for call in calls:
            call.enqueue()
        checker.sweep()
    seconds = time.perf_counter() - start
    proof["m"] = len({call.launch.m for call in calls})
    found = outcome(checker, calls, cases, seconds, None, proof)
    items = {launch.item for launch in launches}
    return replace(
        found,
        errors={item: errors for item in items} if errors else {},
        graded=tuple(graded),
    )


def spread_over_m(
    cases: Sequence[Case], launches: Sequence[Launch], rng: random.Random
) -> list[Launch]:
    """`launches`, and others of m between each item's smallest and largest, in random order."""
    found = list(launches)
    room = _BYTES
    ranges: dict[int, list[Launch]] = {}
    for launch in launches:
        ranges.setdefault(launch.item, []).append(launch)
    inside = {}
    for item, mine in ranges.items():
        known = {launch.m for launch in mine}
        low, high = min(known), max(known)
        between = [m for m in _sample(range(low + 1, high), MOST, rng) if m not in known]
        inside[item] = (mine, between)
    while len(found) < MOST and any(between for _, between in inside.values()):
        for mine, between in inside.values():
            if not between or len(found) >= MOST:
                continue
            m, like = between.pop(), rng.choice(mine)
            able = with_room(cases, m)
            chosen = like.case if like.case in able else rng.choice(able)
            room -= slot_bytes(m, cases[chosen].problem.n)
            if room < 0:
                rng.shuffle(found)
                return found
            offset = rng.randint(0, cases[chosen].problem.m - m)
            found.append(replace(like, case=chosen, offset=offset, m=m))
    rng.shuffle(found)
    return found


def _sample(numbers: range, most: int, rng: random.Random) -> list[int]:
    return rng.sample(numbers, min(most, len(numbers)))


def _call_each(
    calls: Sequence[Call],
    device: torch.device,
    checker: Checker,
    beat: Callable[[], None] = lambda: None,
) -> CallSeries:
    """Make every call, reading the counters of memory in between, and check what came out; `beat`
    is called where calls take long."""
    wait(device)
    before = open_handles()
    names = live_bytes(device).keys()
    memory: dict[str, list[int]] = {name: [0] * (len(calls) + 1) for name in names}
    seconds = [0.0] * len(calls)
    for name, value in live_bytes(device).items():
        memory[name][0] = value
    others, idle, beaten = 0, 0.0, time.perf_counter()
    for index, call in enumerate(calls):
        start = time.perf_counter()
        call.enqueue()
        seconds[index] = time.perf_counter() - start
        if time.perf_counter() > beaten + _LONG:
            beat()
            beaten = time.perf_counter()
        for name, value in live_bytes(device).items():
            memory[name][index + 1] = value
        if device.type == "cuda":
            start = time.perf_counter()
            time.sleep(min(seconds[index], _LONGEST_GAP))
            others += live_bytes(device)["device"] - memory["device"][index + 1]
            idle += time.perf_counter() - start
    checker.sweep()
    wait(device)
    kept = {name: value - memory[name][0] for name, value in live_bytes(device).items()}
    handles = {name: value - before[name] for name, value in open_handles().items()}
    ms = [call.launch.m for call in calls]
    theirs = max(0, others) * sum(seconds) / max(idle, 1e-9)
    return CallSeries(ms, seconds, memory, kept, handles, theirs)


def _plan_times(new: CallSeries, again: CallSeries, proof: dict[str, Any]) -> list[dict[str, Any]]:
    """Host time of the first call of an m against that of its second."""
    later: dict[int, list[float]] = {}
    for m, seconds in zip(again.ms, again.seconds, strict=True):
        later.setdefault(m, []).append(seconds)
    pairs = [
        (seconds, min(later[m]))
        for m, seconds in zip(new.ms, new.seconds, strict=True)
        if m in later
    ]
    if not pairs:
        return []
    first, second = median(p[0] for p in pairs), median(p[1] for p in pairs)
    proof["first_call_us"], proof["second_call_us"] = round(first * 1e6), round(second * 1e6)
    slower = sum(a > 3 * b and a - b > PLAN_SECONDS for a, b in pairs)
    if len(pairs) < 4 or slower < 0.8 * len(pairs):
        return []
    text = (
        f"the first call of an m takes {first * 1e3:.1f} ms on the host, the next "
        f"{second * 1e3:.1f} ms, for {slower} of {len(pairs)} different m"
    )
    return [{"kind": "plan per m", "message": text}]


def _host_syncs(calls: Sequence[Call], proof: dict[str, Any]) -> list[dict[str, Any]]:
    """How many calls return only when a closed gate in front of them has opened."""
    waited = 0
    for call in calls:
        for gate in (0.002, 0.05):
            # A slow call also ends after a short gate; the second one tells the two apart.
            torch.cuda.synchronize()
            torch.cuda._sleep(int(gate * CYCLES))
            closed = torch.cuda.current_stream().record_event()
            call.enqueue()
            if not closed.query():
                break
        else:
            waited += 1
    torch.cuda.synchronize()
    proof["host_sync"], proof["gated"] = waited, len(calls)
    if not waited:
        return []
    text = f"{waited} of {len(calls)} calls waited for the GPU before they returned"
    return [{"kind": "host sync", "message": text}]
