"""First calls made at once: by several threads, on streams of their own, of a process or a weight.

What is made at a first call (a module loaded, a plan, a table, a decoded weight) is made by two
callers at once then, or seen half made by the second.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ....machine.memory import is_out_of_memory
from ...backends import Backend
from ...check.sweep import Checker, SlotReport
from ...launch.case import Call, Case, Launch, prepared_activation, prepared_again, tensors
from ...launch.outcome import Budget, Outcome, device_of, outcome, together, wait
from ...problem import Problem
from ..concurrent.lanes import LANES, Together, run_threads
from .own_process import (
    NOBODYS,
    NoAnswer,
    Question,
    ask,
    backend_there,
    case_there,
    loaded_by,
    name_of,
    whole_problem,
)
from .weights import bound

_ROUNDS = 200
_KEPT = 16
"""Rounds whose prepared weights stay alive, at most."""
_KEPT_BYTES = 4 << 30
"""Bytes of these, about; those of the last round stay whatever they take."""
_STAGGER = (2e-3, 2e-4, 0.0, 5e-3)
"""Seconds between two threads' first calls, by turns of rounds."""
_ROWS = 64
"""Rows of the pool that a process of its own draws, and the largest m that is called there."""


@dataclass(frozen=True, slots=True)
class _Answered:
    """What a process of its own answered of a backend, asked with a layer."""

    backend: Backend
    """Kept, so that no other has its id."""
    layer: Problem
    found: dict[str, Any]

    @property
    def is_nobodys(self) -> bool:
        """Whether it says nothing of the backend."""
        return self.found.get("error", {}).get("kind") in NOBODYS


_asked: dict[int, _Answered] = {}
"""By the backend's id; it is asked once."""


def first_calls(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every launch as the first one of a newly prepared weight, by all threads at once.

    From level `standard` on a process of its own is started besides, once: there the calls are the
    first of all. Exercised where two threads were inside the backend at once.
    """
    start = time.perf_counter()
    parts: list[Outcome] = []
    overlapped = rounds = 0
    end = start + budget.seconds
    chosen = list(launches)
    kept: deque[Any] = deque(maxlen=_rounds_kept(cases))
    least = max(budget.least, len(_STAGGER))
    while chosen and rounds < _ROUNDS:
        late = time.perf_counter() > end
        if overlapped and rounds >= (least if late else max(least, budget.most)):
            break
        stagger = _STAGGER[rounds % len(_STAGGER)]
        part, met = _at_once(backend, cases, chosen[:1] if late else chosen, stagger, kept)
        rounds += 1
        parts.append(part)
        overlapped += met
        budget.beat()
    errors, asked = _own_processes(backend, cases, launches, budget)
    proof = {"rounds": rounds, "overlapped": overlapped, **asked}
    missed = "no two threads were inside the backend at once"
    return replace(
        together(parts),
        seconds=time.perf_counter() - start,
        proof=proof,
        errors=errors,
        not_exercised=None if overlapped or not any(x.m for x in launches) else missed,
    )


def _rounds_kept(cases: Sequence[Case]) -> int:
    """Of how many rounds the prepared weights stay alive: `_KEPT`, or fewer where they are large.

    What cases share is prepared once. What `prepare` returns can hide its tensors: it is taken to
    hold as much as the weight, then.
    """
    shared = {id(case.operands.weight): case for case in cases}
    each = [
        max(sum(t.nbytes for t in tensors(value)) for value in (case.state, case.operands.weight))
        for case in shared.values()
    ]
    return max(1, min(_KEPT, _KEPT_BYTES // max(1, sum(each))))


def _at_once(
    backend: Backend,
    cases: Sequence[Case],
    launches: Sequence[Launch],
    stagger: float,
    kept: deque[Any],
) -> tuple[Outcome, bool]:
    """One round: the weights prepared anew, and each launch made by every thread at once.

    What was prepared joins `kept`, so that nothing new has the identity of what is gone.
    """
    device = device_of(cases)
    # Copies: what is kept by an object or an address has not seen these.
    states = prepared_again(backend, cases, lambda weight: weight.clone())
    kept.append(states)
    rounds = [
        Together(
            tuple((_call_in_lane(backend, cases, states, x, lane),) for lane in range(LANES)), True
        )
        for x in launches
    ]
    calls = [call for each in rounds for (call,) in each.lanes]
    checker = Checker([call.slot for call in calls])
    wait(device)  # the lanes' streams do not wait for what was prepared on this one
    met = run_threads(rounds, streams_for(device), stagger)
    wait(device)
    checker.sweep()
    return outcome(checker, calls, cases, 0.0), bool(met)


def _call_in_lane(
    backend: Backend, cases: Sequence[Case], states: Sequence[Any], launch: Launch, lane: int
) -> Call:
    case = cases[launch.case]
    places = case.problem.m - launch.m + 1
    offset = (launch.offset + lane * max(1, places // LANES)) % places
    rows = prepared_activation(backend, case.rows(offset, launch.m))
    moved = replace(launch, offset=offset)
    return bound(backend, states[launch.case], moved, rows, case.slot(offset, launch.m))


def streams_for(device: torch.device) -> Callable[[int], Any]:
    """What each thread enters: a stream of its own on a GPU, nothing on a CPU."""

    @contextmanager
    def inside(lane: int) -> Iterator[None]:
        if device.type == "cpu":
            yield
            return
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            yield
            torch.cuda.current_stream(device).synchronize()

    return inside


def _own_processes(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> tuple[dict[int, dict[str, str]], dict[str, Any]]:
    """What processes of their own say of each tactic, and how many were asked."""
    spec = loaded_by(backend)
    if spec is None or not budget.long:
        return {}, {"own_processes": 0}
    key, layer = id(backend), replace(cases[0].problem, m=0)
    if key in _asked and _asked[key].layer != layer and _asked[key].is_nobodys:
        del _asked[key]  # with another layer it may be otherwise
    if key not in _asked:
        launch = next((x for x in launches if x.m), launches[0])
        case = cases[launch.case]
        mine = [x for x in launches if x.tactic == launch.tactic and 0 < x.m <= _ROWS]
        ms = tuple(dict.fromkeys(x.m for x in mine)) or (1,)
        question = Question(
            "first-calls",
            spec,
            whole_problem(backend, case, _ROWS),
            case.operands.width or 8,
            case.operands.seed,
            ms,
            (launch.tactic,) * len(ms),
            name_of(device_of(cases)),
            case.expectation.exact,
        )
        try:
            found = ask(question, budget.beat)
        except NoAnswer as failure:
            found = {"error": {"kind": failure.kind, "message": str(failure)}}
        _asked[key] = _Answered(backend, layer, found)
    found = _asked[key].found
    error = found.get("error")
    errors = {launch.item: error for launch in launches} if error else {}
    return errors, {"own_processes": 1, "overlapped_there": int(bool(found.get("overlapped")))}


def answer(question: Question, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """In the child: the first calls of all, by all threads at once, one m after the other; `alive`
    is called whenever it got on."""
    backend = backend_there(question)
    alive()
    device = torch.device(question.device)
    case = case_there(backend, question, device)
    wait(device)
    alive()
    pairs = zip(question.ms, question.tactics, strict=True)
    launches = [Launch(0, 0, m, tactic, 0) for m, tactic in pairs]
    rounds = [
        Together(
            tuple(
                (_call_in_lane(backend, [case], [case.state], x, lane),) for lane in range(LANES)
            ),
            True,
        )
        for x in launches
    ]
    checker = Checker([call.slot for each in rounds for (call,) in each.lanes])
    wait(device)  # the lanes' streams do not wait for what was prepared on this one
    try:
        met = run_threads(rounds, streams_for(device), _STAGGER[1])
        wait(device)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        message = f"among first calls at once: {type(error).__name__}: {lines[0]}"[:300]
        kind = "out of memory" if is_out_of_memory(error) else "error"
        return {"error": {"kind": kind, "message": message}}
    checker.sweep()
    bad = [report for report in checker.reports() if not report.clean]
    if bad:
        return {"error": {"kind": "wrong", "message": _said(bad, len(checker.slots))}}
    return {"overlapped": bool(met)}


def _said(bad: Sequence[SlotReport], calls: int) -> str:
    counts = {key: sum(asdict(each)[key] for each in bad) for key in ("wrong", "unwritten")}
    return (
        f"{len(bad)} of {calls} first calls of a process, made by {LANES} threads at once, came "
        f"out wrong ({counts['wrong']} elements, {counts['unwritten']} of them unwritten)"
    )
