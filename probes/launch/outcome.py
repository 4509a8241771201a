"""What every regime is made of: how long to repeat, what was seen, and the steps they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

import torch

from ..backends import Backend
from ..check.sweep import POISON, Checker, Slot, SlotReport
from .case import Call, Case, Launch, changed_inputs
from .redraw import Redraw

DRAWING = 3
"""Times longer than drawing data anew is what is launched between two draws, at least."""
MOST_QUEUED = 64
"""Times that a chain is enqueued before the device is waited for."""
PULSE = 0.5
"""Seconds of a chain, after which a sign of life is given."""
CYCLES = 2_000_000_000
"""Clock cycles that take about a second: for gates, where too long only costs time."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to repeat: at least `least` times, then until `seconds` or `most`.

    `beat` is called whenever the device has caught up: a long regime is not a silent one. With
    `redraw`, all data are drawn anew `draws` times on the way, at even distances. `long` says that
    what takes seconds whatever the rest is done as well: pauses, and processes of their own.
    """

    least: int
    most: int
    seconds: float
    beat: Callable[[], None] = lambda: None
    redraw: Redraw | None = None
    draws: int = 1
    long: bool = False

    def every(self, repeats: int, seconds: float, drawing: float) -> int:
        """Times between two draws, of `repeats` that take `seconds` each: so far apart that draws
        of `drawing` seconds take a quarter of the time at most."""
        return max(1, repeats // max(1, self.draws), ceil(DRAWING * drawing / seconds))

    def pulse(self, device: torch.device) -> Callable[[], None]:
        """To be called between the calls of a chain: twice a second it waits for the device, and
        tells that it got on. A chain of long calls is no silent one."""
        last = time.perf_counter()

        def pulse() -> None:
            nonlocal last
            if time.perf_counter() > last + PULSE:
                wait(device)
                self.beat()
                last = time.perf_counter()

        return pulse

    def checker(self, slots: Sequence[Slot]) -> Checker:
        """A checker of these slots that knows which draw it saw."""
        found = Checker(slots)
        if self.redraw:
            self.redraw.watch(found.mark)
        return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a regime saw.

    `not_exercised` is None when the conditions the regime stands for really held, else why not;
    such an outcome is never a pass. `repeats` counts the checked launches behind each report;
    `errors` holds what was raised instead, by item. `exempt` holds items that cannot have the
    fault the regime looks for, with the reason: they are neither a pass nor a failure.
    """

    repeats: int
    reports: tuple[tuple[Launch, SlotReport], ...]
    changed_inputs: int
    seconds: float
    not_exercised: str | None = None
    proof: dict[str, Any] = field(default_factory=dict)
    errors: dict[int, dict[str, str]] = field(default_factory=dict)
    exempt: dict[int, str] = field(default_factory=dict)
    draws: int = 0
    """How often all data were drawn anew on the way."""
    graded: tuple[dict[str, Any], ...] = ()
    """Findings about every item that are no faults, each with its `kind` and a `message`."""


Regime = Callable[[Backend, Sequence[Case], Sequence[Launch], Budget], Outcome]


class NotApplicable(Exception):
    """This device does not have what the regime is about; the message says what."""


def device_of(cases: Sequence[Case]) -> torch.device:
    return cases[0].operands.weight.codes.device


def need_cuda(cases: Sequence[Case], what: str) -> None:
    if device_of(cases).type != "cuda":
        raise NotApplicable(f"a CPU has no {what}")


def wait(device: torch.device) -> None:
    """Wait until the device has done all work; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OwnTime:
    """Seconds that this thread worked since the first call of a device's others kept it waiting or
    not: `seconds` is its time on a core, less what it waited for the device in `wait`.

    For limits that a busy node must not reach earlier: there two dozen processes take turns on a
    core and on a GPU, and most of a second is theirs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = time.thread_time()
        self._waited = 0.0

    def wait(self) -> None:
        """Wait until the device has done all work; a queue that is never long makes no call wait
        for room in it."""
        begun = time.thread_time()
        wait(self._device)
        self._waited += time.thread_time() - begun

    @property
    def seconds(self) -> float:
        return time.thread_time() - self._begun - self._waited


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN where the type has one, with a conspicuous byte where not."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor.view(torch.int16).fill_(POISON)
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(0x7F)
    return tensor


def repeat(once: Callable[[], Any], budget: Budget, device: torch.device) -> float:
    """Call `once` as often as the budget says, waiting for little between; the seconds it took."""
    start = time.perf_counter()
    once()
    wait(device)
    each = max(time.perf_counter() - start, 1e-6)
    repeats = max(budget.least, min(budget.most, int(budget.seconds / each)))
    next_draw = budget.every(repeats, each, budget.redraw.seconds) if budget.redraw else repeats
    # In slices of half a second: a queue too deep turns enqueueing into waiting.
    most_queued = min(MOST_QUEUED, max(1, int(0.5 / each)))
    queued = 0
    for done in range(1, repeats):
        if budget.redraw and done == next_draw:
            next_draw = done + budget.every(repeats, each, _draw(budget.redraw, device))
            budget.beat()
        once()
        queued += 1
        if queued == most_queued or done == repeats - 1:
            queued = 0
            wait(device)
            budget.beat()
            if done >= budget.least - 1 and time.perf_counter() - start > budget.seconds:
                break
    return time.perf_counter() - start


def _draw(redraw: Redraw, device: torch.device) -> float:
    """Draw anew; the seconds it took. What a regime makes of the rows can cost more than they do,
    and is renewed with them: without waiting, a queue of draws took longer than a hang."""
    wait(device)
    begun = time.perf_counter()
    redraw()
    wait(device)
    return time.perf_counter() - begun


def outcome(
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
        changed_inputs=changed_inputs(cases),
        seconds=seconds,
        not_exercised=missed,
        proof=proof or {},
    )


def together(parts: Sequence[Outcome]) -> Outcome:
    """Several outcomes of one regime as one; `repeats` is the fewest behind any report."""
    return Outcome(
        repeats=min((part.repeats for part in parts if part.reports), default=0),
        reports=tuple(report for part in parts for report in part.reports),
        changed_inputs=max((part.changed_inputs for part in parts), default=0),
        seconds=sum(part.seconds for part in parts),
        not_exercised=next((p.not_exercised for p in parts if p.not_exercised), None),
        proof={key: value for part in parts for key, value in part.proof.items()},
        errors={item: error for part in parts for item, error in part.errors.items()},
        exempt={item: why for part in parts for item, why in part.exempt.items()},
        graded=tuple(found for part in parts for found in part.graded),
    )


def capture(
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
    with capturing(captured, stream):
        chain()
    return captured


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph,
    stream: torch.cuda.Stream,
    pool: tuple[int, int] | None = None,
) -> Iterator[None]:
    """`torch.cuda.graph` on `stream`, which leaves nothing behind where a capture fails. Its memory
    is of `pool`, or its own.

    torch then keeps the capture's stream as the current one, its allocator goes on recording, and
    its random numbers are taken for a graph's; where a call left another stream current, the
    capture does not even end. What is run next would be blamed for what follows from that. A pool
    is not used again after a failure.
    """
    before = torch.cuda.current_stream()
    own: Any = pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=own, stream=stream):
            yield
    except BaseException:
        torch.cuda.set_stream(stream)
        for end in (
            graph.capture_end,
            partial(_stop_recording, own),
            partial(_capture_one, stream),
        ):
            # It may have come so far by itself, and an older torch has other names.
            with suppress(RuntimeError, AttributeError):
                end()
        raise
    finally:
        torch.cuda.set_stream(before)


def _stop_recording(pool: Any) -> None:
    """Have the allocator record no longer, and let go of what it recorded."""
    device = torch.cuda.current_device()
    torch._C._cuda_endAllocateToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)


def _capture_one(stream: torch.cuda.Stream) -> None:
    """A capture that succeeds: it leaves the state of random numbers as one does."""
    place = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        place.fill_(1)
