"""What a backend may not assume of memory: that it starts clean, stays put, or stays its own."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch

from ...backends import Backend
from ...launch.case import (
    BackendRaised,
    Call,
    Case,
    Launch,
    bind,
    blame,
    copy_over,
    map_tensors,
    prepared_again,
    rebind,
)
from ...launch.case import prepared_activation as prepared
from ...launch.outcome import Budget, Outcome, capture, device_of, need_cuda, outcome, repeat
from ...problem import Fp4Tensor
from ..stamps import LaneStamps
from .allocator import FreeMemory, changed_words, free_blocks, poison_in_graph, take_poisoned

_TRAFFIC = 64 << 20
"""Bytes that the neighbour stream copies at a time."""
_COPIES = 4
_FEW = 8
"""Different launches that are made between replays, about."""
FEW = 4
"""Rounds launched by the host, where the others are replayed."""
_HOST_TRAFFIC = 1 << 20


def churn(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Fresh memory is NaN before every launch, outputs move, and a neighbour uses the memory bus.

    The weight is prepared again, out of poisoned memory, too: padding that `prepare` leaves
    unwritten starts as NaN. Every launch runs with two outputs and two copies of its activation at
    different addresses.
    """
    device = device_of(cases)
    with FreeMemory(device) as free:
        free.learn(lambda: fresh(backend, cases))
        free.poison()
        again = fresh(backend, cases)
    calls = [call for launch in launches for call in _twice(backend, again, launch)]
    random.Random(len(calls)).shuffle(calls)
    checker = budget.checker([call.slot for call in calls])
    with FreeMemory(device) as free, _bus_traffic(device) as traffic:
        # What the backend keeps from its first calls is not fresh any more.
        def each() -> None:
            for call in calls:
                call.enqueue()

        free.learn(each)
        checker.sweep()

        def once(poison: Callable[[], None] = free.poison) -> None:
            traffic.begin()
            for call in calls:
                poison()
                call.enqueue()
            traffic.end()
            checker.sweep()

        graph = device.type == "cuda" and budget.redraw is not None
        seconds = repeat(once, replace(budget, most=FEW) if graph else budget, device)
    if graph:
        # Where many rounds are asked for, the host would be what is waited for.
        captured = capture(partial(once, partial(poison_in_graph, free.need, device)))
        seconds += repeat(captured.replay, budget, device)
    proof = {
        "poisoned_bytes": free.size,
        "poisonings": free.rounds,
        "poison_seen": free.seen,
        **traffic.proof(),
    }
    missed = None if free.seen else "fresh memory does not hold the poison on this machine"
    return outcome(checker, calls, cases, seconds, missed, proof)


def _twice(backend: Backend, cases: Sequence[Case], launch: Launch) -> tuple[Call, Call]:
    """The launch with two outputs, and with its activation at two addresses."""
    moved = bind(backend, cases, launch)
    clone = map_tensors(moved.activation, torch.clone)
    cases[launch.case].derive(lambda: copy_over(moved.activation, clone))
    return bind(backend, cases, launch), rebind(backend, cases, moved, clone)


def fresh(backend: Backend, cases: Sequence[Case]) -> list[Case]:
    """The cases with their weights prepared once more."""
    states = prepared_again(backend, cases)
    return [replace(case, state=state) for case, state in zip(cases, states, strict=True)]


class _Traffic:
    """Copies on another stream, or in another thread, while launches run."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.copies = 0
        self._stop = threading.Event()
        size = _TRAFFIC if self._cuda else _HOST_TRAFFIC
        self._source = torch.zeros(size, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._stamps = LaneStamps(2, device)

    def begin(self) -> None:
        if not self._cuda:
            return
        start = torch.cuda.current_stream().record_event()
        self._stream.wait_event(start)
        with torch.cuda.stream(self._stream):
            self._stamps.take(1, 0)
            for _ in range(_COPIES):
                self._target.copy_(self._source)
                self.copies += 1
            self._stamps.take(1, 1)
        self._stamps.take(0, 0)

    def end(self) -> None:
        if self._cuda:
            self._stamps.take(0, 1)
            torch.cuda.current_stream().wait_stream(self._stream)
            self._stamps.count()

    def run(self) -> None:
        # With pauses: the launches wait for this thread where both want the interpreter.
        while not self._stop.wait(0.0005):
            self._target.copy_(self._source)
            self.copies += 1

    def stop(self) -> None:
        self._stop.set()

    def proof(self) -> dict[str, int]:
        found = {"copies": self.copies}
        return {**found, **self._stamps.proof()} if self._cuda else found


@contextmanager
def _bus_traffic(device: torch.device) -> Iterator[_Traffic]:
    traffic = _Traffic(device)
    if device.type == "cuda":
        yield traffic
        return
    thread = threading.Thread(target=traffic.run)
    thread.start()
    try:
        yield traffic
    finally:
        traffic.stop()
        thread.join()


def regrow(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """A graph captured first, larger problems run after it, then the graph replayed.

    The layers are prepared afresh, the chain is captured, and then an activation of twice the rows
    of the pool makes workspaces grow. Whatever the allocator has free afterwards is taken, and
    filled with NaN: if the graph still uses it, that shows in the results, or as a write into
    memory that is not the backend's (`guard`). Between two replays one launch is made eagerly.
    """
    need_cuda(cases, "CUDA graphs")
    device = device_of(cases)
    torch.cuda.empty_cache()
    again = fresh(backend, cases)
    ordered = sorted(launches, key=lambda launch: launch.m)
    calls = [bind(backend, again, launch) for launch in ordered]
    checker = budget.checker([call.slot for call in calls])

    def chain() -> None:
        for call in calls:
            call.enqueue()
        checker.sweep()

    captured = capture(chain)
    rows, refused = _grow(backend, again, ordered[-1])
    for call in reversed(calls):
        call.enqueue()
    checker.sweep()
    torch.cuda.synchronize(device)
    gc.collect()
    held = take_poisoned(free_blocks(device), device)
    torch.cuda.synchronize(device)
    between = cycle(bind(backend, again, launch) for launch in ordered[:: -(-len(ordered) // _FEW)])

    def once() -> None:
        captured.replay()
        next(between).enqueue()

    seconds = repeat(once, budget, device)
    stray = changed_words(held)
    proof = {
        "captured_up_to": ordered[-1].m,
        "grown_to": rows,
        "taken_bytes": 2 * sum(each.numel() for each in held),
        "stray_words": stray,
    }
    missed = None if rows > ordered[-1].m else f"nothing larger could be run: {refused}"
    found = outcome(checker, calls, cases, seconds, missed, proof)
    if stray:
        reports = [(x, replace(report, guard=report.guard + stray)) for x, report in found.reports]
        found = replace(found, reports=tuple(reports))
    return found


def _grow(backend: Backend, cases: Sequence[Case], largest: Launch) -> tuple[int, str]:
    """Run more rows than ever, eagerly, on every case; how many, and what kept it from more."""
    pool, device = cases[0].problem.m, device_of(cases)
    why = ""
    for rows in (2 * pool + 1, pool):
        try:
            for case in cases:
                activation = prepared(backend, _repeated(case, rows))
                shape = (rows, case.problem.n)
                out = torch.empty(shape, dtype=case.problem.dtype, device=device)
                with blame(backend):
                    backend.run(case.state, activation, out, largest.tactic)
            torch.cuda.synchronize()
            return rows, why
        except (RuntimeError, BackendRaised) as error:
            torch.cuda.synchronize()  # raises if the context is lost
            why = str(error).strip().splitlines()[0] if str(error).strip() else "an error"
    return 0, why


def _repeated(case: Case, rows: int) -> torch.Tensor | Fp4Tensor:
    """An activation of `rows` rows: the pool's, over and over."""
    a = case.rows(0, case.problem.m)
    device = case.expectation.lo.device
    index = torch.arange(rows, device=device) % max(1, case.problem.m)
    if isinstance(a, Fp4Tensor):
        return replace(a, codes=a.codes[index], scales=a.scales[index])
    return a[index]
