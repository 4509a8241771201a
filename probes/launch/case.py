"""A weight prepared for one backend, a pool of activation rows, and the right answer to each row.

Rows of a GEMM are independent, so any window of the pool is a problem of its own with its answer
already known: the reference is computed once and serves every launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends import Backend
from ..check.reference import Expectation, expect
from ..check.sweep import Slot, Unchanged, changed_tensors, slot, slot_bytes
from ..data import Operands
from ..problem import Fp4Tensor, Problem


class BackendRaised(Exception):
    """A backend raised: its doing, where an exception of our own code would be ours."""


@contextmanager
def blame(backend: object) -> Iterator[None]:
    """Tell what a backend raises from what this program does.

    RuntimeError passes: it is what torch and CUDA raise, also later, for what a backend enqueued.
    """
    try:
        yield
    except (RuntimeError, BackendRaised):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise BackendRaised(f"{type(error).__name__}: {first}") from error


@dataclass(frozen=True, slots=True)
class Case:
    """Operands with their answer, prepared for one backend. `problem.m` is the pool's rows."""

    problem: Problem
    operands: Operands
    expectation: Expectation
    state: Any
    unchanged: Unchanged
    derived: list[Callable[[], object]] = field(default_factory=list)
    """What makes each copy of activation rows what they have become, where they are drawn anew."""

    def derive(self, refresh: Callable[[], object]) -> None:
        """Call `refresh` whenever the rows have been drawn anew."""
        if self.operands.rows is not None:
            self.derived.append(refresh)

    def rows(self, offset: int, m: int) -> torch.Tensor | Fp4Tensor:
        """The activation of the window of `m` rows from `offset`; a view."""
        assert offset >= 0 and offset + m <= self.problem.m, "a window ends in its pool"
        a = self.operands.a
        if isinstance(a, Fp4Tensor):
            return dataclasses.replace(
                a, codes=a.codes[offset : offset + m], scales=a.scales[offset : offset + m]
            )
        return a[offset : offset + m]

    def slot(self, offset: int, m: int) -> Slot:
        """A poisoned place for the window's output, with what must appear there."""
        window = slice(offset, offset + m)
        return slot(self.expectation.lo[window], self.expectation.hi[window])


def changed_inputs(cases: Iterable[Case]) -> int:
    """How many tensors that these cases were given are, or were, changed; waits for the device,
    once for all of them."""
    every = {id(u): u for each in cases for u in (each.unchanged, *each.unchanged.shared)}
    return changed_tensors(every.values())


def case(backend: Backend, problem: Problem, operands: Operands) -> Case:
    """Compute the answer to `operands`, then let `backend` prepare the weight.

    Inputs are remembered after `prepare`: what a backend does to its own copy there is its
    business, what a launch changes is a finding.
    """
    expectation = expect(operands, problem)
    with blame(backend):
        state = backend.prepare(operands.weight, problem)
    weight = operands.weight
    inputs = [weight.codes, weight.scales, weight.global_scale, *tensors(operands.a)]
    return Case(problem, operands, expectation, state, Unchanged(inputs))


def prepared_again(
    backend: Backend, cases: Sequence[Case], change: Callable[[Any], Any] = lambda weight: weight
) -> list[Any]:
    """What `backend` makes of each case's weight, or of what `change` makes of it; of one that
    several cases share, once."""
    made: dict[int, Any] = {}
    with blame(backend):
        for case in cases:
            weight = case.operands.weight
            if id(weight) not in made:
                made[id(weight)] = backend.prepare(change(weight), case.problem)
    return [made[id(case.operands.weight)] for case in cases]


@dataclass(frozen=True, slots=True)
class Launch:
    """One call: which window of which case's pool, by which tactic, counted for which item."""

    case: int
    offset: int
    m: int
    tactic: str
    item: int


@dataclass(frozen=True, slots=True)
class Call:
    """A launch with everything bound: `enqueue` puts it on the current stream."""

    launch: Launch
    activation: Any
    slot: Slot
    enqueue: Callable[[], None]


def bind(backend: Backend, cases: Sequence[Case], launch: Launch) -> Call:
    """Allocate the launch's slot and bind its arguments, so that calling it is one call."""
    chosen = cases[launch.case]
    rows = chosen.rows(launch.offset, launch.m)
    activation = prepared_activation(backend, rows)
    if activation is not rows:
        chosen.derive(lambda: copy_over(prepared_activation(backend, rows), activation))
    place = chosen.slot(launch.offset, launch.m)

    def enqueue() -> None:
        with blame(backend):
            backend.run(chosen.state, activation, place.out, launch.tactic)

    return Call(launch, activation, place, enqueue)


def with_room(cases: Sequence[Case], m: int) -> list[int]:
    """Which of the cases have pools of `m` rows at least."""
    return [index for index, each in enumerate(cases) if each.problem.m >= m]


def rebind(backend: Backend, cases: Sequence[Case], call: Call, activation: Any) -> Call:
    """The same launch into the same slot, reading another activation."""
    state = cases[call.launch.case].state

    def enqueue() -> None:
        with blame(backend):
            backend.run(state, activation, call.slot.out, call.launch.tactic)

    return Call(call.launch, activation, call.slot, enqueue)


def prepared_activation(backend: Backend, a: object) -> Any:
    """The activation as `backend` takes it."""
    prepare = getattr(backend, "prepare_activation", None)
    if prepare is None or not isinstance(a, Fp4Tensor):
        return a
    with blame(backend):
        return prepare(a)


def own_quantiser(backend: Backend) -> Callable[[torch.Tensor, torch.Tensor], Any] | None:
    """The backend's `quantise`, which engines launch before a W4A4 GEMM; None if it has none, or
    takes 16-bit activations."""
    return getattr(backend, "quantise", None) if backend.activation == "fp4" else None


def quantise_and_run(
    backend: Backend,
    state: Any,
    a: torch.Tensor,
    global_scale: torch.Tensor,
    out: torch.Tensor,
    tactic: str,
) -> None:
    """Enqueue the quantiser on a (m, k), 16-bit floats, and the GEMM behind it, into out (m, n)."""
    quantise = own_quantiser(backend)
    assert quantise is not None
    with blame(backend):
        backend.run(state, quantise(a, global_scale), out, tactic)


def batches(cases: Sequence[Case], launches: Sequence[Launch], limit: int) -> list[list[Launch]]:
    """Split `launches`, in order, so that the slots of one batch fit in `limit` bytes."""
    split: list[list[Launch]] = [[]]
    used = 0
    for launch in launches:
        size = slot_bytes(launch.m, cases[launch.case].problem.n)
        if split[-1] and used + size > limit:
            split.append([])
            used = 0
        split[-1].append(launch)
        used += size
    return split if split[-1] else []


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it replaced; looks into tuples, lists, dicts, dataclasses."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, change) for v in value)
    if isinstance(value, dict):
        return {key: map_tensors(v, change) for key, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        mapped = {name: map_tensors(v, change) for name, v in fields.items()}
        if all(mapped[name] is fields[name] for name in fields):
            return value  # others' classes may not be made of their fields
        return type(value)(**mapped)
    return value


def copy_over(source: Any, target: Any) -> None:
    """Every tensor in `source` into the one at its place in `target`."""
    for origin, to in zip(tensors(source), tensors(target), strict=True):
        to.copy_(origin)


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in `value`, in the order `map_tensors` visits them."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, keep)
    return found
