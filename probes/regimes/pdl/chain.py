"""Chains of calls, each behind a kernel that is late on purpose, and the clock they go by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...check.sweep import Slot
from ...grouped.tensors import Routed
from ...launch.case import map_tensors

SHORT_NS = (5_000, 20_000)
LONG_NS = (80_000, 2_000_000)
"""Bounds of the third delay, which is half as long again as the call."""
TURNS = len(SHORT_NS) + 1
BLOCK = 4096
"""64-bit words that a program of an adversary has under way at once."""

Move = tuple[torch.Tensor, torch.Tensor]
"""What is copied: source and target, of one size and layout."""


@dataclass(frozen=True, slots=True)
class Step:
    """What follows an adversary: one call, or several in a row, and the outputs they write.

    `moves` are what an adversary that stores the activations stores.
    """

    enqueue: Callable[[], None]
    slots: tuple[Slot, ...] = ()
    moves: tuple[Move, ...] = ()
    duration_ns: int = 0


class DelayClock:
    """How long the adversary of each step waits, round by round, and when it had waited.

    The delay of each step changes from round to round: two short ones, and one longer than the
    call itself, since a kernel that stores early does so at its end.
    """

    def __init__(self, steps: Sequence[Step], device: torch.device, late: bool = True) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.programs = max(1, properties.multi_processor_count // 8)
        """Few enough to be all resident at once: the next kernel starts when each has triggered."""
        rows = [(*SHORT_NS, _longest(step.duration_ns)) if late else (0,) * TURNS for step in steps]
        self._delays = torch.tensor(rows, dtype=torch.int64, device=device)
        self._rounds = torch.zeros(1, dtype=torch.int64, device=device)
        self._times = torch.zeros((len(steps), self.programs), dtype=torch.int64, device=device)

    def at(self, index: int) -> tuple[Any, ...]:
        """The first arguments of the kernel in front of step `index`."""
        return index, self._delays, TURNS, self._rounds, self._times

    def over(self, steps: slice) -> torch.Tensor:
        """int64: when the first program of each step's adversary had waited, last round."""
        return self._times[steps].min(dim=1).values

    def hurry(self, steps: int) -> None:
        """From now on the adversaries of the first `steps` do not wait; those of controls do."""
        self._delays[:steps] = 0

    def tick(self) -> None:
        """A round is over."""
        self._rounds += 1


def _longest(duration_ns: int) -> int:
    return min(max(duration_ns * 3 // 2, LONG_NS[0]), LONG_NS[1])


@dataclass(frozen=True, slots=True)
class Chain:
    """Steps, and the adversary in front of each, ready to be enqueued any number of times."""

    steps: tuple[Step, ...]
    clock: DelayClock
    strike: Callable[[int], None]
    """Launches the adversary of a step."""
    reset: Callable[[], None]
    """Makes what the adversaries will store unusable until they do."""

    def enqueue(self, between: Callable[[int, str], None] = lambda index, when: None) -> None:
        """The chain, on the current stream; `between` is told what was enqueued last."""
        for index, step in enumerate(self.steps):
            self.strike(index)
            between(index, "adversary")
            step.enqueue()
            between(index, "call")


class Moves:
    """Moves of several steps as a table in device memory, as the kernels take it."""

    def __init__(self, steps: Sequence[Sequence[Move]], device: torch.device) -> None:
        rows: list[tuple[int, int, int]] = []
        spans = []
        for moves in steps:
            first = len(rows)
            rows += [(a.data_ptr(), b.data_ptr(), a.numel() * a.element_size()) for a, b in moves]
            spans.append((first, len(rows)))
        self._table = torch.tensor(rows or [(0, 0, 0)], dtype=torch.int64, device=device)
        self._spans = tuple(spans)
        self._kept = steps

    def of(self, index: int) -> tuple[Any, ...]:
        """The kernel's arguments for one step: table, first and last move."""
        return self._table, *self._spans[index]


def arriving(
    activation: Any,
    place: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like,
    derive: Callable[[Callable[[], object]], None] = lambda refresh: None,
) -> tuple[Any, tuple[Move, ...]]:
    """The activation as its consumer gets it, empty until the moves beside it are made.

    Single scalars stay what they are: a kernel may rightly read them before it waits. `place`
    gives a tensor of the same shape, dtype and strides to copy into; `derive` is told how to renew
    a copy that had to be made.
    """
    moves: list[Move] = []
    owner = activation

    def late(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or (
            tensor.dtype == torch.float32 and tensor.numel() == 1 and not isinstance(owner, Routed)
        ):
            return tensor
        target = place(tensor)
        # Both ends of a move are copied as bytes, so they must lie in memory in the same order.
        source = tensor
        if tensor.stride() != target.stride():
            source = tensor.clone()
            derive(partial(source.copy_, tensor))
        moves.append((source, target))
        return target

    return map_tensors(activation, late), tuple(moves)


def duration_ns(enqueue: Callable[[], None]) -> int:
    """How long a call takes in peace; also compiles and loads whatever its first use needs."""
    enqueue()
    before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    enqueue()
    behind.record()
    behind.synchronize()
    return int(1e6 * before.elapsed_time(behind))
