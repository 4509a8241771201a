"""Which weight a call is about: several of one shape, many at once, old ones gone, new data in one.

A table of plans, scratch or decoded weights that is keyed by shape, by address or by a slot of a
fixed number answers with the weight of another layer. Engines have dozens of layers of one shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...backends import Backend
from ...check.sweep import Checker, Slot, slot
from ...data.generator import hash_rows, mix
from ...grouped.tensors import SIGNS, ExpertWeights
from ...launch.case import (
    Call,
    Case,
    Launch,
    bind,
    blame,
    prepared_activation,
    tensors,
    with_room,
)
from ...launch.outcome import (
    Budget,
    Outcome,
    OwnTime,
    capture,
    device_of,
    outcome,
    poison,
    repeat,
    together,
    wait,
)
from ...launch.variants import same_place, variant
from ...problem import Fp4Tensor, Problem
from ..leaks import live_bytes
from .small import small_problem

MOST = 1056
"""Weights alive at once: more than any table of 1,024 has slots."""
_LEAST = 9
"""Weights alive at once where time allows no more: one more than a table of 8."""
_LEAST_LARGE = 3
"""Weights alive at once where they are large and memory has no room for `_LEAST`."""
_LARGE_BYTES = 1 << 27
"""What a large weight takes more than: most are sets of experts. Of others there are `_LEAST`
however little memory is free at the moment."""
_LOOK = 8
"""Weights after which memory is looked at again."""
_BEAT = 0.5
"""Seconds after which it is told that the crowd grows."""
_TIMES = 3
"""How many budgets of seconds the crowd may take."""
_GPU_SECONDS = 3.0
"""Of this thread's own time (`OwnTime`), those that it may take on a GPU in any case: where others
keep it and the cores busy it must not end at forty weights."""
_GPU_PATIENCE = 3.0
"""Times as long by the clock, then."""
_FEW_BYTES = 1 << 30
"""A crowd of all `MOST` that takes no more than this on a GPU ends by patience only, `_CHEAP_TIMES`
as long: each of its weights costs next to nothing, and a thread that waits for a device in turns
looks busy."""
_CHEAP_TIMES = 20.0
_SMALL_SECONDS = 1.0
_SHARE = 8
"""One part in so many of a device's free memory may be taken by the crowd: others of ours may do
the same at once."""
_LOADS = 4
"""Weights that are loaded one after the other at one address."""
HELD = 10
"""Times a weight's own bytes that a backend may hold for it: fp32 takes 7.1, fp64 14."""
_SLACK = 64 << 10
_FACTORS = (4.0, 0.25, 2.0, 0.5, 1.0)
"""Of a dynamic global scale: what another batch may bring."""
_ONCE = 2
"""Weights that are prepared before memory is looked at: what is held once for all is there then."""


def weights(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Calls in which only the weight tells the answers apart.

    *In turn*: A, B, A at one m, each with the activation of the first (as q, k and v have one) and
    with its own. *Crowd*: hundreds of weights of this shape alive at once, each called twice, in
    two orders. *Loaded*: a weight is let go, another is put at its address and prepared. *Updated*:
    the prepared weight gets new values in place, where the backend has `update`; on a GPU under a
    captured graph, too. What the crowd holds is held against what its weights take (`memory held`).
    """
    smallest = smallest_of_each(launches)
    empty = list({x.item: x for x in launches if not x.m}.values())
    parts = [_in_turn(backend, cases, [*smallest, *empty], budget)]
    if smallest:
        parts.append(_crowd(backend, cases, smallest, budget))
        budget.beat()
        parts.append(_loaded(backend, cases, smallest, budget))
        if getattr(backend, "update", None) is not None:
            parts.append(_updated(backend, cases, smallest, budget))
    return together(parts)


def smallest_of_each(launches: Sequence[Launch]) -> list[Launch]:
    """The smallest launch of each item that has a row."""
    found: dict[int, Launch] = {}
    for launch in launches:
        if launch.m and launch.m < found.get(launch.item, launch).m + 1:
            found[launch.item] = launch
    return list(found.values())


def _in_turn(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """A, B, A on one activation, whose answers with both are known, and on one's own each; of an
    activation in FP4 on the same codes under another global scale, too."""
    calls: list[Call] = []
    others: dict[int, _Prepared] = {}
    for launch in launches:
        budget.beat()
        case = cases[launch.case]
        # Another weight of this shape, prepared once for all cases that have this one.
        key = id(case.operands.weight)
        if key not in others:
            others[key] = _prepared(backend, case, 1)
        own = bind(backend, cases, launch)
        calls += [own, others[key].call(backend, case, launch, own.activation)]
        calls += [bind(backend, cases, launch)]
        if isinstance(case.operands.a, Fp4Tensor):
            calls += [_rescaled(backend, case, launch), bind(backend, cases, launch)]
        if (swapped := _with_another_weight(cases, launch)) is not None:
            calls += [bind(backend, cases, swapped), bind(backend, cases, launch)]
    checker = Checker([call.slot for call in calls])

    def once() -> None:
        for call in calls:
            call.enqueue()
        checker.sweep()

    seconds = repeat(once, replace(budget, seconds=budget.seconds / 4), device_of(cases))
    return outcome(checker, calls, cases, seconds, None, {"in_turn": checker.sweeps})


def _with_another_weight(cases: Sequence[Case], launch: Launch) -> Launch | None:
    """The launch on the next case of another weight that has room for it; None where none has."""
    own = cases[launch.case].operands.weight
    able = [i for i in with_room(cases, launch.m) if cases[i].operands.weight is not own]
    if not able:
        return None
    chosen = next((index for index in able if index > launch.case), able[0])
    places = cases[chosen].problem.m - launch.m + 1
    return replace(launch, case=chosen, offset=launch.offset % places)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Variant `index` of a weight, prepared; it serves all cases of that weight."""

    index: int
    weight: Any
    state: Any

    def call(self, backend: Backend, case: Case, launch: Launch, activation: Any) -> Call:
        """The launch with this weight, on an activation of its case."""
        place = variant(case, self.index).slot(launch.offset, launch.m, guard=512)
        return bound(backend, self.state, launch, activation, place)


def bound(backend: Backend, state: Any, launch: Launch, activation: Any, place: Slot) -> Call:
    """A call of any state, as `launch.case.bind` makes them of a case's."""

    def enqueue() -> None:
        with blame(backend):
            backend.run(state, activation, place.out, launch.tactic)

    return Call(launch, activation, place, enqueue)


def _prepared(backend: Backend, case: Case, index: int) -> _Prepared:
    weight = variant(case, index).weight
    with blame(backend):
        return _Prepared(index, weight, backend.prepare(weight, case.problem))


def _rescaled(backend: Backend, case: Case, launch: Launch) -> Call:
    """The launch on an activation of other global scale, a power of two away, whose answer is
    that many times as large; of the same scale where no such answer is exact."""
    rows = case.rows(launch.offset, launch.m)
    assert isinstance(rows, Fp4Tensor)
    window = case.expectation.window(launch.offset, launch.offset + launch.m)
    factor = next(f for f in _FACTORS if _is_exact(window.lo, f) and _is_exact(window.hi, f))
    scaled = replace(rows, global_scale=rows.global_scale * factor)
    place = slot(window.lo * factor, window.hi * factor)
    return bound(backend, case.state, launch, prepared_activation(backend, scaled), place)


def _is_exact(values: torch.Tensor, factor: float) -> bool:
    scaled = values * factor
    return bool((scaled.isfinite() & (scaled / factor == values)).all())


def _crowd(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """As many weights as memory and time allow, all alive; each called in two orders.

    `_LEAST` at least; of large ones that have no room `_LEAST_LARGE`. The proof says how many.
    """
    device = device_of(cases)
    start = time.perf_counter()
    end = start + _TIMES * max(budget.seconds, 0.05)
    launch = launches[0]
    case = cases[launch.case]
    activation = prepared_activation(backend, case.rows(launch.offset, launch.m))
    size = sum(t.nbytes for t in tensors(case.operands.weight))
    room = _room(device)
    before = _bytes_in_use(device)
    crowd: list[_Prepared] = []
    calls: list[Call] = []
    own, seconds = OwnTime(device), _GPU_SECONDS if device.type == "cuda" else 0.0
    cheap = device.type == "cuda" and MOST * size <= _FEW_BYTES
    full, crammed, beaten = False, False, start
    while len(crowd) < MOST:
        took = time.perf_counter() - start
        worked = own.seconds > seconds and not cheap
        patience = seconds * (_CHEAP_TIMES if cheap else _GPU_PATIENCE)
        late = start + took > end and (worked or took > patience)
        if len(crowd) % _LOOK == 0 or len(crowd) < _LEAST or _LOOK * size > room // 4:
            own.wait()
            used = _bytes_in_use(device) - before
            full = used > room
            crammed = size > _LARGE_BYTES and _is_crammed(used, len(crowd), room)
        if crammed or (len(crowd) >= _LEAST and (late or full)):
            break
        crowd.append(_prepared(backend, case, len(crowd) + 1))
        calls.append(crowd[-1].call(backend, case, launch, activation))
        # Called as it comes: what is decoded at a first call is decoded, and the time is known.
        calls[-1].enqueue()
        if len(crowd) == _ONCE:
            wait(device)
            before = _bytes_in_use(device)
        if time.perf_counter() > beaten + _BEAT:
            own.wait()
            budget.beat()
            beaten = time.perf_counter()
    wait(device)
    errors = _holding(_bytes_in_use(device) - before, size, calls[_ONCE:])
    for other in launches[1:]:
        # Tactics share what was prepared.
        if other.case == launch.case:
            rows = prepared_activation(backend, case.rows(other.offset, other.m))
            calls += [each.call(backend, case, other, rows) for each in crowd[:_LEAST]]
    checker = Checker([call.slot for call in calls])
    for call in calls[len(crowd) :]:
        call.enqueue()
    checker.sweep()
    _again(calls[::-1], checker)
    wait(device)
    budget.beat()
    small = _small_ones(backend, cases, launch)
    budget.beat()
    _again(calls, checker)
    wait(device)
    budget.beat()
    if time.perf_counter() < end:
        _again(calls[::2] + calls[1::2], checker)
    proof = {"alive": len(crowd)}
    if small is not None:
        proof["small_alive"] = len(small.states)
        errors = errors or small.mistaken()
    found = outcome(checker, calls, cases, time.perf_counter() - start, None, proof)
    return replace(found, errors={each.item: errors for each in launches} if errors else {})


@dataclass(frozen=True, slots=True)
class _SmallOnes:
    """Weights of a small shape, which make a crowd large where the layer's own are too costly.

    outs (weights, 1, n) in the output dtype is what came out; right, two of these, the lowest and
    the highest that may.
    """

    backend: Backend
    problem: Problem
    tactic: str
    activation: Any
    states: list[Any]
    outs: torch.Tensor
    right: tuple[torch.Tensor, torch.Tensor]

    def run(self, index: int) -> None:
        """One call of one weight."""
        with blame(self.backend):
            self.backend.run(self.states[index], self.activation, self.outs[index], self.tactic)

    def mistaken(self) -> dict[str, str]:
        """An error where a further call of any of them gives another answer than its own."""
        count = len(self.states)
        wrong = self._unlike(count)
        poison(self.outs)
        for index in reversed(range(count)):
            self.run(index)
        wrong = max(wrong, self._unlike(count))
        if not wrong:
            return {}
        n, k = self.problem.n, self.problem.k
        text = f"{wrong} of {count} weights of n={n}, k={k}, all alive, did not give their answer"
        return {"kind": "wrong", "message": text}

    def _unlike(self, count: int) -> int:
        """How many of the first `count` outputs are not what they may be."""
        outs, (lo, hi) = self.outs[:count], self.right
        return int((~((outs >= lo[:count]) & (outs <= hi[:count]))).flatten(1).any(dim=1).sum())


def _small_ones(backend: Backend, cases: Sequence[Case], launch: Launch) -> _SmallOnes | None:
    """Up to `MOST` weights of a shape that costs little, prepared and called once; on a CPU only,
    where nothing is compiled for a shape."""
    case = cases[launch.case]
    found = small_problem(backend, cases, case, rows=1)
    if found is None:
        return None
    problem, operands, expected = found
    n = expected.lo.shape[1]
    # Each with its rows moved and its sign by a hash: two that share a slot of a table differ.
    bits = hash_rows(MOST, mix(1), "cpu")
    rows = (torch.arange(n) - (bits & 0xFFFF).unsqueeze(1)) % n
    negated = (bits >> 20 & 1).bool()
    weight: Any = operands.weight
    lo, hi = (t[:, rows].transpose(0, 1) for t in (expected.lo, expected.hi))
    sign = negated[:, None, None]
    answers = torch.where(sign, -hi, lo), torch.where(sign, -lo, hi)
    outs = poison(torch.empty(MOST, 1, n, dtype=problem.dtype))
    a = operands.a
    made = _SmallOnes(
        backend, problem, launch.tactic, prepared_activation(backend, a), [], outs, answers
    )
    end = time.process_time() + _SMALL_SECONDS
    while len(made.states) < MOST and time.process_time() < end:
        at = len(made.states)
        own = _rows_moved(weight, rows[at], bool(negated[at]))
        with blame(backend):
            made.states.append(backend.prepare(own, problem))
        made.run(at)
    return made


def _rows_moved(weight: Any, rows: torch.Tensor, negated: bool) -> Any:
    """A weight with its rows in this order, which begins at any and goes round; negated or not."""
    if isinstance(weight, ExpertWeights):
        return weight.moved(int((rows == 0).nonzero()), negated)
    codes = weight.codes[rows]
    codes = codes ^ SIGNS if negated else codes
    return replace(weight, codes=codes, scales=weight.scales[rows])


def _bytes_in_use(device: torch.device) -> int:
    """Bytes in use, by torch's account on a GPU, by `malloc`'s on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return live_bytes(device).get("host", 0)


def _again(calls: Sequence[Call], checker: Checker) -> None:
    for call in calls:
        call.enqueue()
    checker.sweep()


def _room(device: torch.device) -> int:
    """Bytes that a crowd may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // _SHARE
    return 1 << 30


def _is_crammed(used: int, alive: int, room: int) -> bool:
    """Whether a crowd of fewer than `_LEAST` has no room for another weight.

    used: bytes in use since `_ONCE` of the `alive` ones were prepared.
    """
    if not _LEAST_LARGE <= alive < _LEAST:
        return False
    return (alive + 1) * used > (alive - _ONCE) * room


def _holding(held: int, size: int, calls: Sequence[Call]) -> dict[str, str]:
    """An error where the weights of `calls`, of `size` bytes each, take far more than they should.

    held: bytes in use since before they were prepared, their own and their outputs' among them.
    Where a crowd is small its weights are large, so one alone is far above what else comes and
    goes.
    """
    places = [call.slot for call in calls]
    ours = sum(s.guarded.nbytes + s.lo.nbytes + s.hi.nbytes for s in places)
    each = (held - ours) / len(calls) - size
    if each <= HELD * size + _SLACK:
        return {}
    text = (
        f"{each / 1024:.0f} KiB stay for each prepared weight of {size / 1024:.0f} KiB, "
        f"measured on {len(calls)}"
    )
    return {"kind": "memory held", "message": text}


def _by_weight(cases: Sequence[Case], launches: Sequence[Launch]) -> list[list[Launch]]:
    """The first launch of each tactic, those on one weight together: what is prepared of it serves
    all tactics, and takes longer than their calls."""
    found: dict[int, list[Launch]] = {}
    for launch in {x.tactic: x for x in reversed(launches)}.values():
        found.setdefault(id(cases[launch.case].operands.weight), []).append(launch)
    return list(found.values())


def _turned(calls: Sequence[Call], index: int) -> list[Call]:
    """The calls, begun elsewhere at each of `_LOADS` indices: the tactic that comes first meets
    what no other has met."""
    first = index * len(calls) // _LOADS
    return [*calls[first:], *calls[:first]]


def _loaded(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Weights that come one after the other at one address, each when the last is gone; tried with
    the first launch of each tactic."""
    start = time.perf_counter()
    parts: list[Outcome] = []
    again = 0
    for mine in _by_weight(cases, launches):
        budget.beat()
        case = cases[mine[0].case]
        # What a backend has once for all is at one address, and not used again.
        shared = {t.data_ptr() for t in tensors(case.state)}
        seen: set[int] = set()
        place = variant(case, 0).weight
        for index in range(_LOADS):
            same_place(place, variant(case, 2 * index + 1).weight)
            part, own = _of_a_load(backend, cases, mine, place, index, budget)
            parts.append(part)
            own -= shared
            again += bool(own & seen)
            seen |= own
            budget.beat()
    proof = {"loaded": len(parts), "at_an_address_used_before": again}
    seconds = time.perf_counter() - start
    return replace(together(parts), proof=proof, seconds=seconds)


def _of_a_load(
    backend: Backend,
    cases: Sequence[Case],
    launches: Sequence[Launch],
    weight: Any,
    index: int,
    budget: Budget,
) -> tuple[Outcome, set[int]]:
    """Each launch twice on what is prepared of the `index`th load, and the addresses of that;
    nothing of it is left when this returns."""
    device = device_of(cases)
    with blame(backend):
        state = backend.prepare(weight, cases[launches[0].case].problem)
    calls: list[Call] = []
    for launch in launches:
        case = cases[launch.case]
        activation = prepared_activation(backend, case.rows(launch.offset, launch.m))
        place = variant(case, 2 * index + 1).slot(launch.offset, launch.m)
        calls.append(bound(backend, state, launch, activation, place))
    checker = Checker([call.slot for call in calls])
    pulse = budget.pulse(device)
    for _ in range(2):
        for call in _turned(calls, index):
            call.enqueue()
            pulse()
        checker.sweep()
    wait(device)
    own = {t.data_ptr() for t in tensors(state) if t.numel()}
    return outcome(checker, calls, cases, 0.0), own


def _updated(
    backend: Backend,
    cases: Sequence[Case],
    launches: Sequence[Launch],
    budget: Budget,
) -> Outcome:
    """New values in a prepared weight, by the backend's own `update`; a graph stays what it is.
    With the first launch of each tactic, as weights are loaded."""
    parts = [
        part
        for mine in _by_weight(cases, launches)
        for part in _updates_of_one(backend, cases, mine, budget)
    ]
    return replace(together(parts), proof={"updated": len(parts)})


def _updates_of_one(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> list[Outcome]:
    """What each update of one weight came to, in each launch, and in a graph of each."""
    device = device_of(cases)
    update: Callable[[Any, Any, Any], None] = backend.update  # type: ignore[attr-defined]
    first = cases[launches[0].case]
    made = _prepared(backend, first, 0)
    calls, graphs = [], []
    for launch in launches:
        budget.beat()
        case = cases[launch.case]
        activation = prepared_activation(backend, case.rows(launch.offset, launch.m))
        calls.append(made.call(backend, case, launch, activation))
        if device.type == "cuda":
            graphs.append(capture(calls[-1].enqueue))
        poison(calls[-1].slot.out)
    parts = []
    for index in range(1, _LOADS):
        budget.beat()
        with blame(backend):
            update(made.state, variant(first, index).weight, first.problem)
        again = [_updated_call(call, cases[call.launch.case], index) for call in calls]
        checker = Checker([call.slot for call in again])
        pulse = budget.pulse(device)
        for call in _turned(again, index):
            call.enqueue()
            pulse()
        checker.sweep()
        for graph in graphs:
            graph.replay()
            pulse()
        if graphs:
            checker.sweep()
        parts.append(outcome(checker, again, cases, 0.0))
    budget.beat()
    return parts


def _updated_call(call: Call, case: Case, index: int) -> Call:
    """The call into the same place, whose answer is that of another variant of its weight."""
    right = variant(case, index).slot(call.launch.offset, call.launch.m)
    return replace(call, slot=Slot(call.slot.out, right.lo, right.hi, call.slot.guarded))
