"""Several launches at once with the same prepared weight: on streams, in a graph, in threads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from ...backends import Backend
from ...grouped.backend import AsDense
from ...launch.case import Call, Case, Launch, bind, with_room
from ...launch.outcome import (
    CYCLES,
    Budget,
    Outcome,
    capture,
    device_of,
    need_cuda,
    outcome,
    repeat,
    wait,
)
from ..stamps import Holder, LaneStamps

LANES = 4
"""Streams (or threads) at once: what engines use for overlapped layers, and enough to collide."""
IN_A_ROW = 4
"""Calls of one m that each lane makes, so that lanes meet."""
LONG_M = 256
"""From above this on calls are so long that half as many meet."""
MOST_M = 16
"""Different m that are run in all lanes at once."""
LARGE_M = 1024
"""Above this a call takes long and fills the device alone: lanes meet at small m."""
FEW_LARGE = 2
"""Launches above `LARGE_M` that each lane of a dense layer makes, whatever they are."""
MORE = 3
"""Rounds more, with gates that hold work back for longer, where streams did not overlap: a busy
host enqueues more slowly than the GPU computes."""
_LONGEST_GATES = (0.1, 0.4)
"""Seconds, usually and then."""
ROUNDS = 200
"""Threads with calls too short to overlap every time are sent at most so often until they do."""


@dataclass(frozen=True, slots=True)
class Together:
    """Calls that are made at once: one list a lane, each lane's calls in order.

    `one_m`: whether all are of one m; their launches then share whatever is keyed by shape and m.
    """

    lanes: tuple[tuple[Call, ...], ...]
    one_m: bool

    @property
    def kind(self) -> str:
        return "one m" if self.one_m else "many m"


def streams(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Several lanes at once with the same prepared weight, launched eagerly.

    First every launch in each lane, so that different m meet; then each m in all lanes at once, on
    one weight and on two weights of one shape. On a GPU a kernel holds most of it meanwhile, so
    that blocks of the lanes trickle in among each other.
    """
    rounds = rounds_of(backend, cases, launches)
    calls = calls_of(rounds)
    checker = budget.checker([c.slot for c in calls])
    device = device_of(cases)
    if device.type == "cpu":

        def once() -> frozenset[str]:
            overlapped = run_threads(rounds, lambda lane: nullcontext())
            checker.sweep()
            return overlapped

        seconds, missed, proof = repeat_threads(once, kinds_of(rounds), budget, device)
        return outcome(checker, calls, cases, seconds, missed, proof)

    forks = Forks(rounds, device)
    gate, longest = [0.01], [_LONGEST_GATES[0]]

    pulse = budget.pulse(device)

    def gated() -> None:
        for number, together in enumerate(rounds):
            # A closed gate lets the work queue up, so that the lanes overlap on the GPU even where
            # the host enqueues more slowly than the GPU computes.
            torch.cuda._sleep(int(gate[0] * CYCLES))
            start = time.perf_counter()
            forks.enqueue(number, together)
            gate[0] = min(1.5 * (time.perf_counter() - start), longest[0])
            if longest[0] > _LONGEST_GATES[0]:
                wait(device)
                budget.beat()
            pulse()  # where others take turns on the device, a round takes many gates' time
        checker.sweep()

    seconds = repeat(gated, budget, device)
    missed, proof = forks.proof("streams")
    longest[0] = _LONGEST_GATES[1]  # too long costs time only
    for _ in range(MORE):
        if missed is None:
            break
        seconds += repeat(gated, Budget(1, 1, 0.0, budget.beat), device)
        missed, proof = forks.proof("streams")
    return outcome(checker, calls, cases, seconds, missed, proof)


def graph_streams(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """The lanes of `streams` as branches of one CUDA graph."""
    need_cuda(cases, "CUDA graphs")
    rounds = rounds_of(backend, cases, launches)
    calls = calls_of(rounds)
    checker = budget.checker([c.slot for c in calls])
    forks = Forks(rounds, device_of(cases))

    def chain() -> None:
        for number, together in enumerate(rounds):
            forks.enqueue(number, together)
        checker.sweep()

    def one_by_one() -> None:
        for call in calls:
            call.enqueue()
        checker.sweep()

    # Warmed without overlap: that belongs to the replay.
    captured = capture(chain, warm=one_by_one)
    seconds = repeat(captured.replay, budget, device_of(cases))
    missed, proof = forks.proof("graph branches")
    return outcome(checker, calls, cases, seconds, missed, proof)


def rounds_of(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch]
) -> list[Together]:
    """Every launch once in each lane, each lane starting elsewhere in the chain; then one m at a
    time in all lanes, on one weight and on two.

    Lanes work on rows of their own: on equal rows, a shared scratch buffer would hold what each
    lane expects, whoever wrote it. Of m that take long each range has its smallest, see `thinned`.
    """
    launches = thinned(launches, cases, isinstance(backend, AsDense))
    chains = []
    for lane in range(LANES):
        shift = lane * len(launches) // LANES
        order = [*launches[shift:], *launches[:shift]]
        chains.append(tuple(bind(backend, cases, _moved(cases, x, lane)) for x in order))
    rounds = [Together(tuple(chains), one_m=False)]
    by_m = list({(x.tactic, x.m): x for x in launches if x.m}.values())
    for launch in by_m[:: -(-len(by_m) // MOST_M) or 1]:
        able = with_room(cases, launch.m)
        place = able.index(launch.case)
        in_a_row = IN_A_ROW if launch.m <= LONG_M else IN_A_ROW // 2
        for weights in sorted({1, min(2, len(able))}):
            lanes = []
            for lane in range(LANES):
                chosen = replace(launch, case=able[(place + lane % weights) % len(able)])
                lanes.append((bind(backend, cases, _moved(cases, chosen, lane)),) * in_a_row)
            rounds.append(Together(tuple(lanes), one_m=True))
    return rounds


def thinned(launches: Sequence[Launch], cases: Sequence[Case], routed: bool) -> list[Launch]:
    """The launches, in order; of an item's above `LARGE_M` those of its smallest such m, and of
    more as long as all lanes together would else make fewer calls of it than it has launches.

    All of them where there are few and the layer is dense (not `routed`), and where they are
    counted as problems that differ: rows are drawn anew then, or an m is launched on several
    windows.
    """
    large = [x for x in launches if x.m > LARGE_M]
    differ = len({(x.item, x.tactic, x.m) for x in large}) == len(large)
    fresh = any(case.operands.rows is not None for case in cases)
    if fresh or not differ or (len(large) <= FEW_LARGE and not routed):
        return list(launches)
    of_item: dict[tuple[int, str], list[Launch]] = {}
    for launch in sorted(large, key=lambda launch: launch.m):
        of_item.setdefault((launch.item, launch.tactic), []).append(launch)
    kept = {x for mine in of_item.values() for x in mine[: -(-len(mine) // LANES)]}
    return [x for x in launches if x.m <= LARGE_M or x in kept]


def calls_of(rounds: Sequence[Together]) -> list[Call]:
    """Every call of the rounds, once each."""
    return [call for each in rounds for lane in each.lanes for call in dict.fromkeys(lane)]


def kinds_of(rounds: Sequence[Together]) -> frozenset[str]:
    """The kinds of rounds there are: each must have overlapped."""
    return frozenset(each.kind for each in rounds)


def _moved(cases: Sequence[Case], launch: Launch, lane: int) -> Launch:
    """The launch on rows further down the pool, as far as the pool allows."""
    places = cases[launch.case].problem.m - launch.m + 1
    step = max(1, places // LANES)
    return replace(launch, offset=(launch.offset + lane * step) % places)


class Forks:
    """Rounds on streams of their own between two points of the current one, with what proves that
    lanes ran at once."""

    def __init__(self, rounds: Sequence[Together], device: torch.device) -> None:
        self._side = [torch.cuda.Stream(device) for _ in range(LANES)]
        self._holding = torch.cuda.Stream(device)
        self._stamps = {kind: LaneStamps(LANES, device) for kind in kinds_of(rounds)}
        self._holder = Holder(device)

    def enqueue(self, number: int, together: Together) -> None:
        """Fork, run each lane on its stream, join; with a holder where all are of one m."""
        stamps = self._stamps[together.kind]
        main = torch.cuda.current_stream()
        fork = main.record_event()
        if together.one_m:
            self._holding.wait_event(fork)
            with torch.cuda.stream(self._holding):
                self._holder.hold(number)
        for index, (lane, stream) in enumerate(zip(together.lanes, self._side, strict=True)):
            stream.wait_event(fork)
            with torch.cuda.stream(stream):
                if together.one_m:
                    self._holder.let_begin()
                stamps.take(index, 0)
                for call in lane:
                    call.enqueue()
                stamps.take(index, 1)
            main.wait_event(stream.record_event())
        if together.one_m:
            main.wait_event(self._holding.record_event())
        stamps.count()

    def proof(self, lanes: str) -> tuple[str | None, dict[str, Any]]:
        """Why the regime was not exercised (None if it was), and the numbers."""
        found = {kind: stamps.proof() for kind, stamps in self._stamps.items()}
        missed = [kind for kind, each in found.items() if not each["overlapped"]]
        totals = {
            name: sum(each[name] for each in found.values()) for name in ("rounds", "overlapped")
        }
        proof = {"lanes": lanes, **totals, **found}
        why = f"the {lanes} never overlapped on the GPU, of {' and '.join(missed)}"
        return (why if missed else None), proof


def repeat_threads(
    once: Callable[[], frozenset[str]],
    kinds: frozenset[str],
    budget: Budget,
    device: torch.device,
) -> tuple[float, str | None, dict[str, Any]]:
    """`repeat` rounds of threads, and on until each kind overlapped, `ROUNDS` at most: on a busy
    host a short lane ends before the next thread has begun.

    `once` says which kinds of rounds overlapped. Returns seconds, why the regime was not exercised
    (None if it was), and the proof.
    """
    overlaps: list[frozenset[str]] = []

    def missing() -> frozenset[str]:
        return kinds.difference(*overlaps)

    start = time.perf_counter()
    repeat(lambda: overlaps.append(once()), budget, device)
    while missing() and len(overlaps) < ROUNDS:
        overlaps.append(once())
    seconds = time.perf_counter() - start
    proof = {
        "lanes": "threads",
        "rounds": len(overlaps),
        "overlapped": sum(found >= kinds for found in overlaps),
        **{kind: sum(kind in found for found in overlaps) for kind in sorted(kinds)},
    }
    missed = " and ".join(sorted(missing()))
    why = f"no two threads were inside the backend at once, with {missed}"
    return seconds, (why if missed else None), proof


def run_threads(
    rounds: Sequence[Together],
    inside: Callable[[int], AbstractContextManager[object]],
    stagger: float = 0.0,
) -> frozenset[str]:
    """Run each lane in a thread of its own, round after round; the kinds of rounds in which two
    were inside the backend at once.

    A thread enters ``inside(lane)`` first, and no thread begins a round before all have come so
    far; each begins `stagger` seconds after the one before it. What the first call to fail raised
    is raised when all threads have ended.
    """
    barrier = threading.Barrier(LANES)
    spans: list[list[tuple[float, float]]] = [[] for _ in rounds]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with inside(index):
                for together, mine in zip(rounds, spans, strict=True):
                    barrier.wait()
                    if stagger:
                        time.sleep(index * stagger)
                    start = time.perf_counter()
                    try:
                        for call in together.lanes[index]:
                            call.enqueue()
                    finally:
                        mine.append((start, time.perf_counter()))
        except threading.BrokenBarrierError:
            return
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(LANES)]
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
    found = set()
    for together, mine in zip(rounds, spans, strict=True):
        mine.sort()
        if any(later[0] < earlier[1] for earlier, later in pairwise(mine)):
            found.add(together.kind)
    return frozenset(found)
