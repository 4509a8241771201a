"""Calls by the hundred thousand: what depends on how many there were, or on when the last one was.

A counter of 16 bits that wraps, a buffer that is changed over every ten thousand calls, a plan that
is thrown away after a pause: none shows in a few hundred calls, and replays of a graph, which call
no host code, never show it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...backends import Backend
from ...check.reference import Expectation
from ...check.sweep import SlotReport
from ...data import window
from ...grouped.tensors import Routed
from ...launch.case import Case, Launch, blame, changed_inputs, prepared_activation
from ...launch.outcome import Budget, Outcome, device_of, poison, wait
from .small import small_problem
from .weights import smallest_of_each

_WRAPS = tuple((1 << bits) + (1 << 10) for bits in (15, 16, 17))
"""Calls after which counters of 15, 16 and 17 bits have wrapped."""
CALLS = _WRAPS[-1]
"""Calls that are aimed at: all of those, and 1 call in 10,000 comes 13 times."""
_RING = 65
"""Outputs that are checked at once: the last has another activation than the first."""
_SHORT_RING = 5
"""The same where so many outputs take more than `_RING_BYTES`."""
_RING_BYTES = 64 << 20
_TURNS = 3
"""Activations that take turns: the answer of the call before is wrong."""
_LEAST = 1 << 11
"""Calls of a tactic that are made whatever the time, up to `_GRACE` seconds beyond it."""
_GRACE = 5.0
"""Of this thread's own time (`_Pace`): others may keep it waiting."""
_BUSY = 4
"""Times as long by the clock, where a call sleeps, or others keep the thread or the device busy."""
_SLOW = 2
"""The same where the device keeps this thread waiting, and no more of `_WRAPS` would be reached in
`_BUSY` times."""
_QUEUED = 2
"""Rounds that a GPU may be behind this thread."""
_FEW_ROWS = 64
"""The largest m that is called by the hundred thousand: more rows cost time and show no more."""
_TIMES, _LONG_TIMES = 4, 8
"""How many budgets of seconds the many calls of all tactics may take: the second where a budget is
long."""
_GPU_SECONDS = 5.0
"""The same of a GPU, of this thread's own time (`_Pace`): they are to reach `CALLS` if calls are
cheap, on a busy node, too."""
PAUSE = 2.5
"""Seconds between two calls, in which nothing is called."""
_done: dict[tuple[int, str], Backend] = {}
"""Backends and tactics that have had their many calls in this process, by id: once is enough."""
_paused: dict[int, Backend] = {}
"""Backends that have had their pause in this process, by id."""


def history(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Eager calls of one launch of each tactic, every output checked, then a pause, and more calls.

    On a CPU they are made on the smallest shape that the backend takes, where a call costs little
    but itself. `proof` says how many were made. Once a process each tactic has many calls of its
    smallest m, and each backend its pause; all else is called a few times. Of the time for many
    calls a tactic has one half of what is left, and the last all of it.
    """
    start = time.perf_counter()
    reports: list[tuple[Launch, SlotReport]] = []
    errors: dict[int, dict[str, str]] = {}
    proof: dict[str, Any] = {"calls": 0, "pause_seconds": 0.0}
    long = budget.long
    waiting = {
        launch.tactic
        for launch in launches
        if launch.m and (id(backend), launch.tactic) not in _done
    }
    left = budget.seconds * (_LONG_TIMES if long else _TIMES)
    if long and device_of(cases).type == "cuda":
        left = max(left, _GPU_SECONDS)
    for launch in sorted(smallest_of_each(launches), key=lambda each: each.m):
        series, small = _series(backend, cases, launch)
        many = launch.tactic in waiting and (small or launch.m <= _FEW_ROWS)
        if many:
            waiting.discard(launch.tactic)
            if long:
                _done[id(backend), launch.tactic] = backend
            seconds = max(left / 2 if waiting else left, 0.02)
            left -= series.run(_Limits(CALLS, _LEAST, seconds, budget.beat))
        else:
            left -= series.run(_few(series, budget))
        if long and id(backend) not in _paused:
            _paused[id(backend)] = backend
            end = time.monotonic() + PAUSE
            while time.monotonic() < end:
                budget.beat()
                time.sleep(0.25)
            proof["pause_seconds"] = PAUSE
            series.run(_few(series, budget))
        proof["calls"] += series.made
        if small:
            # What failed is not the launch's own shape: it is said in words.
            reports.append((launch, SlotReport(0, 0, 0, 0, 0, None, ())))
            if series.bad:
                errors[launch.item] = {"kind": "wrong", "message": series.said()}
        else:
            reports.append((launch, series.report()))
    return Outcome(
        repeats=proof["calls"] // max(1, len(reports)),
        reports=tuple(reports),
        changed_inputs=changed_inputs(cases),
        seconds=time.perf_counter() - start,
        proof=proof,
        errors=errors,
        exempt=without_rows(launches),
    )


def without_rows(launches: Sequence[Launch]) -> dict[int, str]:
    """The items none of whose launches has a row, and why there is nothing to see."""
    with_rows = {launch.item for launch in launches if launch.m}
    return {x.item: "there is no row to compute" for x in launches if x.item not in with_rows}


@dataclass(frozen=True, slots=True)
class _Limits:
    """When a series of calls ends: after so many, or when the time is over and the least made."""

    calls: int
    least: int
    seconds: float
    beat: Callable[[], None]


def _few(series: _Series, budget: Budget) -> _Limits:
    """Two rounds, whatever they take."""
    return _Limits(2 * series.round, 2 * series.round, 0.0, budget.beat)


class _Pace:
    """How long a series of rounds takes, and whether it goes on.

    On a GPU `follow` leaves it `_QUEUED` rounds to do: to wait for all of them after each would
    take as long as the calls. What checks a round is behind it on its stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done: deque[torch.cuda.Event] = deque()
        """Of rounds that may yet be to do, the first of them first."""
        self._begun = self._seen = time.thread_time()
        self._least = float("inf")
        """Of this thread's own time, what a round took at least."""
        self._idle = 0.0
        """Of this thread's own time, what it only waited for the device."""
        self._held = 0.0
        """The same by the clock."""
        self._gave_up = False
        self._start = self.now = time.perf_counter()

    def follow(self) -> None:
        """After each round: wait for the one `_QUEUED` before it."""
        if self._device.type == "cuda":
            took = time.thread_time() - self._seen
            self._least = min(self._least, took)
            # Rounds of many launches fill the queue: what they take more is waiting for room in it.
            full = max(0.0, took - 2 * self._least)
            self._idle += full
            self._held += full
            self._done.append(torch.cuda.current_stream(self._device).record_event())
            if len(self._done) > _QUEUED:
                self._wait(self._done.popleft().synchronize)
            self._seen = time.thread_time()
        self.now = time.perf_counter()

    def goes_on(self, made: int, limits: _Limits) -> bool:
        """Whether there is time for another round after so many calls."""
        past = self.now - self._start
        if made >= limits.least and past >= _SLOW * limits.seconds and self._held > past / 2:
            wrap = next((wrap for wrap in _WRAPS if wrap > made), CALLS)
            if made * _BUSY * limits.seconds < wrap * past:
                self._gave_up = True
                return False
        late = max(self._own, past / _BUSY) >= limits.seconds + _GRACE
        in_time = self._counted() < limits.seconds and past < _BUSY * limits.seconds
        return in_time or (made < limits.least and not late)

    def end(self, limits: _Limits) -> float:
        """Wait for all rounds; the seconds that count. One that gave up had all it was given."""
        if self._device.type == "cuda":
            self._wait(lambda: wait(self._device))
        self.now = time.perf_counter()
        given = limits.seconds if self._gave_up else 0.0
        return max(self._counted(), (self.now - self._start) / _BUSY, given)

    @property
    def _own(self) -> float:
        """Seconds that this thread worked, on a core."""
        return time.thread_time() - self._begun - self._idle

    def _counted(self) -> float:
        return self.now - self._start if self._device.type == "cpu" else self._own

    def _wait(self, until: Callable[[], None]) -> None:
        begun, own = time.perf_counter(), time.thread_time()
        until()
        self._idle += time.thread_time() - own
        self._held += time.perf_counter() - begun


class _Series:
    """Calls of one state into a ring of outputs, on activations that take turns.

    state as `prepare` gave it; turns: activation (m, k) and answer (m, n) of each.
    """

    def __init__(
        self,
        backend: Backend,
        state: Any,
        turns: Sequence[tuple[Any, Expectation]],
        tactic: str,
    ) -> None:
        right = turns[0][1].lo
        m, n = right.shape
        self._n = n
        self.round = _RING if _RING * right.nbytes <= _RING_BYTES else _SHORT_RING
        self._ring = poison(torch.empty(self.round, m, n, dtype=right.dtype, device=right.device))
        order = [index % len(turns) for index in range(self.round)]
        self._lo = torch.stack([turns[index][1].lo for index in order])
        self._hi = torch.stack([turns[index][1].hi for index in order])
        self._bad = torch.zeros(self.round, dtype=torch.int64, device=right.device)
        self._first = torch.full((1,), CALLS * 8, dtype=torch.int64, device=right.device)
        self._place = torch.arange(1, self.round + 1, device=right.device)
        outs = list(self._ring)

        def round_() -> None:
            with blame(backend):
                for index, turn in enumerate(order):
                    backend.run(state, turns[turn][0], outs[index], tactic)

        self._round = round_
        self.made = 0

    def run(self, limits: _Limits) -> float:
        """Call, and check each output, until a limit is reached; the seconds that count, of which
        a waiting host has some, too."""
        pace, first = _Pace(self._ring.device), self.made
        beaten = pace.now
        while self.made - first < limits.calls and pace.goes_on(self.made - first, limits):
            self._round()
            wrong = ~((self._ring >= self._lo) & (self._ring <= self._hi)).flatten(1).all(dim=1)
            self._bad += wrong
            at = torch.where(wrong, self._place + self.made, CALLS * 8)
            self._first = torch.minimum(self._first, at.min())
            poison(self._ring)
            self.made += self.round
            pace.follow()
            if pace.now > beaten + 0.5:
                limits.beat()
                beaten = pace.now
        return pace.end(limits)

    @property
    def bad(self) -> int:
        """Calls that came out wrong; waits for the device."""
        return int(self._bad.sum())

    def said(self) -> str:
        """The failures in words."""
        return (
            f"{self.bad} of {self.made} calls in a row came out wrong, the first of them call "
            f"{int(self._first)} (m={self._ring.shape[1]}, n={self._n})"
        )

    def report(self) -> SlotReport:
        """The failures as those of one launch; `first` is the number of the first bad call."""
        bad = self.bad
        return SlotReport(bad, 0, 0, bad, 0, None, (), first=int(self._first) if bad else 0)


def _series(backend: Backend, cases: Sequence[Case], launch: Launch) -> tuple[_Series, bool]:
    """Calls of the launch, and whether on another, smaller shape."""
    case = cases[launch.case]
    small = small_problem(backend, cases, case, rows=_TURNS)
    if small is None:
        places = max(1, min(_TURNS, case.problem.m // launch.m))
        offsets = [(launch.offset + i * launch.m) % (case.problem.m - launch.m + 1)
                   for i in range(places)]  # fmt: skip
        turns = [
            (
                prepared_activation(backend, case.rows(offset, launch.m)),
                case.expectation.window(offset, offset + launch.m),
            )
            for offset in offsets
        ]
        return _Series(backend, case.state, turns, launch.tactic), False
    problem, operands, right = small
    with blame(backend):
        state = backend.prepare(operands.weight, problem)
    turns = []
    for index in range(_TURNS):
        row = operands.a[index : index + 1] if isinstance(operands.a, Routed) else None
        one = window(operands, index, index + 1).a if row is None else row
        turns.append((prepared_activation(backend, one), right.window(index, index + 1)))
    return _Series(backend, state, turns, launch.tactic), True
