"""Launch conditions. Each regime runs launches its own way, checked, and proves it was exercised.

A regime is a function ``(backend, cases, launches, budget) -> Outcome``. On a GPU lanes are
streams, on a CPU they are threads; a regime a device does not have is `not applicable`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .backends import Backend
from .case import Call, Case, Launch, bind, map_tensors, rebind, tensors
from .checks import POISON, Checker, SlotReport

LANES = 4
"""Streams (or threads) at once: what engines use for overlapped layers, and enough to collide."""
_CYCLES = 2_000_000_000
"""Clock cycles that take about a second: for gates, where too long only costs time."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to repeat: at least `least` times, then until `seconds` or `most`.

    `beat` is called whenever the device has caught up: a long regime is not a silent one.
    """

    least: int
    most: int
    seconds: float
    beat: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a regime saw.

    `not_exercised` is None when the conditions the regime stands for really held, else why not;
    such an outcome is never a pass. `repeats` counts the checked launches behind each report;
    `errors` holds what was raised instead, by item.
    """

    repeats: int
    reports: tuple[tuple[Launch, SlotReport], ...]
    changed_inputs: int
    seconds: float
    not_exercised: str | None = None
    proof: dict[str, Any] = field(default_factory=dict)
    errors: dict[int, dict[str, str]] = field(default_factory=dict)


Regime = Callable[[Backend, Sequence[Case], Sequence[Launch], Budget], Outcome]


class NotApplicable(Exception):
    """This device does not have what the regime is about; the message says what."""


def serial(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """One launch after the other on the current stream."""
    calls = [bind(backend, cases, launch) for launch in launches]
    checker = Checker([c.slot for c in calls])

    def once() -> None:
        for call in calls:
            call.enqueue()
        checker.sweep()

    seconds = _repeat(once, budget, _device(cases))
    return _outcome(checker, calls, cases, seconds)


def graph(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """One CUDA graph holding the whole chain of different problems, replayed."""
    _need_cuda(cases, "CUDA graphs")
    calls = [bind(backend, cases, launch) for launch in launches]
    checker = Checker([c.slot for c in calls])

    def chain() -> None:
        for call in calls:
            call.enqueue()
        checker.sweep()

    captured = _capture(chain)
    seconds = _repeat(captured.replay, budget, _device(cases))
    return _outcome(checker, calls, cases, seconds)


def streams(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Several lanes at once with the same prepared weight, launched eagerly."""
    lanes = _lanes(backend, cases, launches)
    calls = [call for lane in lanes for call in lane]
    checker = Checker([c.slot for c in calls])
    if _device(cases).type == "cpu":
        overlaps: list[bool] = []

        def once() -> None:
            overlaps.append(_run_threads(lanes))
            checker.sweep()

        seconds = _repeat(once, budget, _device(cases))
        proof = {"lanes": "threads", "rounds": len(overlaps), "overlapped": sum(overlaps)}
        missed = None if any(overlaps) else "no two threads were inside the backend at once"
        return _outcome(checker, calls, cases, seconds, missed, proof)

    side = [torch.cuda.Stream() for _ in lanes]
    stamps = _Stamps(len(lanes), _device(cases))
    gate = [0.01]

    def gated() -> None:
        # A closed gate lets the work queue up, so that the lanes overlap on the GPU even where
        # the host enqueues more slowly than the GPU computes.
        torch.cuda._sleep(int(gate[0] * _CYCLES))
        start = time.perf_counter()
        _fork_join(lanes, side, stamps)
        gate[0] = min(1.5 * (time.perf_counter() - start), 0.1)
        checker.sweep()
        stamps.count()

    seconds = _repeat(gated, budget, _device(cases))
    proof = {"lanes": "streams", **stamps.proof()}
    missed = None if proof["overlapped"] else "the streams never overlapped on the GPU"
    return _outcome(checker, calls, cases, seconds, missed, proof)


def graph_streams(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Several streams at once with the same prepared weight, inside one CUDA graph."""
    _need_cuda(cases, "CUDA graphs")
    lanes = _lanes(backend, cases, launches)
    calls = [call for lane in lanes for call in lane]
    checker = Checker([c.slot for c in calls])
    side = [torch.cuda.Stream() for _ in lanes]
    stamps = _Stamps(len(lanes), _device(cases))

    def chain() -> None:
        _fork_join(lanes, side, stamps)
        checker.sweep()
        stamps.count()

    def one_by_one() -> None:
        for call in calls:
            call.enqueue()

    # Warmed without overlap: that belongs to the replay.
    captured = _capture(chain, warm=one_by_one)
    seconds = _repeat(captured.replay, budget, _device(cases))
    proof = {"lanes": "graph branches", **stamps.proof()}
    missed = None if proof["overlapped"] else "the graph's branches never overlapped on the GPU"
    return _outcome(checker, calls, cases, seconds, missed, proof)


def side_stream(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """A side stream whose input arrives late: only the current stream's order makes it right.

    Until a delayed copy on the side stream the activation holds poison, so a kernel launched on
    any other stream reads poison.
    """
    _need_cuda(cases, "streams")
    bound = [bind(backend, cases, launch) for launch in launches]
    calls = [
        rebind(backend, cases, call, map_tensors(call.activation, torch.empty_like))
        for call in bound
    ]
    checker = Checker([c.slot for c in calls])
    side = torch.cuda.Stream()
    held = total = 0

    def once() -> None:
        nonlocal held, total
        for call in calls:
            map_tensors(call.activation, _poison)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for call, source in zip(calls, bound, strict=True):
                torch.cuda._sleep(_CYCLES // 1000)
                gate = side.record_event()
                late = zip(tensors(call.activation), tensors(source.activation), strict=True)
                for to, origin in late:
                    to.copy_(origin)
                call.enqueue()
                held += not gate.query()
                total += 1
        torch.cuda.synchronize()
        checker.sweep()

    seconds = _repeat(once, budget, _device(cases))
    proof = {"calls": total, "returned_before_input": held}
    missed = None if held else "every call waited for the GPU before it returned"
    return _outcome(checker, calls, cases, seconds, missed, proof)


# Those that a shared lock can hang come last: a worker that dies there has shown the rest.
REGIMES: dict[str, Regime] = {
    "serial": serial,
    "graph": graph,
    "side-stream": side_stream,
    "streams": streams,
    "graph-streams": graph_streams,
}


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN where the type has one, with a conspicuous byte where not."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor.view(torch.int16).fill_(POISON)
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(0x7F)
    return tensor


def _device(cases: Sequence[Case]) -> torch.device:
    return cases[0].operands.weight.codes.device


def _need_cuda(cases: Sequence[Case], what: str) -> None:
    if _device(cases).type != "cuda":
        raise NotApplicable(f"a CPU has no {what}")


def _repeat(once: Callable[[], Any], budget: Budget, device: torch.device) -> float:
    """Call `once` as often as the budget says, without waiting between; the seconds it took."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    start = time.perf_counter()
    once()
    wait()
    each = max(time.perf_counter() - start, 1e-6)
    repeats = max(budget.least, min(budget.most, int(budget.seconds / each))) - 1
    done = 0
    while done < repeats:
        # In slices of about a second: a queue too deep turns enqueueing into waiting.
        for _ in range(min(16, max(1, int(1 / each)), repeats - done)):
            once()
            done += 1
        wait()
        budget.beat()
        if done + 1 >= budget.least and time.perf_counter() - start > budget.seconds:
            break
    return time.perf_counter() - start


def _outcome(
    checker: Checker,
    calls: Sequence[Call],
    cases: Sequence[Case],
    seconds: float,
    missed: str | None = None,
    proof: dict[str, Any] | None = None,
) -> Outcome:
    launches = [c.launch for c in calls]
    return Outcome(
        repeats=checker.sweeps,
        reports=tuple(zip(launches, checker.reports(), strict=True)),
        changed_inputs=sum(c.unchanged.changed() for c in cases),
        seconds=seconds,
        not_exercised=missed,
        proof=proof or {},
    )


def _capture(
    chain: Callable[[], None], warm: Callable[[], Any] | None = None
) -> torch.cuda.CUDAGraph:
    """Capture `chain`, after running it (or `warm`) once on the capturing stream.

    First calls may load modules and allocate, which a capture forbids.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        (warm or chain)()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        chain()
    return captured


def _lanes(backend: Backend, cases: Sequence[Case], launches: Sequence[Launch]) -> list[list[Call]]:
    """Every launch once in each lane, each lane starting elsewhere in the sequence."""
    lanes = []
    for lane in range(LANES):
        shift = lane * len(launches) // LANES
        order = [*launches[shift:], *launches[:shift]]
        lanes.append([bind(backend, cases, launch) for launch in order])
    return lanes


def _fork_join(
    lanes: Sequence[Sequence[Call]], side: Sequence[torch.cuda.Stream], stamps: _Stamps
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


def _run_threads(lanes: Sequence[Sequence[Call]]) -> bool:
    """Run each lane in a thread of its own; whether two were inside the backend at once."""
    barrier = threading.Barrier(len(lanes))
    spans: list[tuple[float, float]] = []
    errors: list[BaseException] = []

    def work(lane: Sequence[Call]) -> None:
        try:
            barrier.wait()
            start = time.perf_counter()
            for call in lane:
                call.enqueue()
            spans.append((start, time.perf_counter()))
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return max(start for start, _ in spans) < min(end for _, end in spans)


class _Stamps:
    """When each lane began and ended, by the GPU's own clock, and how often lanes overlapped."""

    def __init__(self, lanes: int, device: torch.device) -> None:
        self._times = torch.zeros((lanes, 2), dtype=torch.int64, device=device)
        self._rounds = torch.zeros(2, dtype=torch.int64, device=device)

    def take(self, lane: int, end: int) -> None:
        from ._stamp_triton import stamp

        stamp[(1,)](self._times, 2 * lane + end)

    def count(self) -> None:
        """Count this round, and whether any lane began before one that began earlier ended."""
        starts, order = self._times[:, 0].sort()
        ends = self._times[:, 1][order].cummax(0).values
        overlapped = (starts[1:] < ends[:-1]).any()
        self._rounds += torch.stack([torch.ones_like(self._rounds[0]), overlapped.long()])

    def proof(self) -> dict[str, int]:
        rounds, overlapped = self._rounds.tolist()
        return {"rounds": rounds, "overlapped": overlapped}
