"""Mutants that go by the number of calls, or by the time since the last one."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import torch

from ..problem import Fp4Tensor, Problem
from .floor import Right


class CounterWraps(Right):
    """Numbers the calls of each weight in `bits` bits, and takes number 0 for one without rows."""

    def __init__(self, name: str, bits: int) -> None:
        super().__init__(name)
        self.mask = (1 << bits) - 1

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return super().prepare(weight, problem), count(1)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        own, calls = state
        if next(calls) & self.mask:
            super().run(own, a, out, tactic)


class SwapsBuffers(Right):
    """Computes in a buffer, and changes it for another every `every` calls, one call too early."""

    def __init__(self, name: str, every: int) -> None:
        super().__init__(name)
        self.every = every
        self.calls = count(1)
        self.buffer = torch.empty(0)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        late = next(self.calls) % self.every == 0 and self.buffer.shape == out.shape
        right = self.product(state, a, out.shape[1])
        out.copy_(self.buffer if late else right)
        self.buffer = right


class ForgetsAfterAPause(Right):
    """Lets its scratch go when it was not called for `seconds`, and the next call finds none."""

    def __init__(self, name: str, seconds: float = 1.0) -> None:
        super().__init__(name)
        self.seconds = seconds
        self.last = time.monotonic()

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        now = time.monotonic()
        forgotten, self.last = now - self.last > self.seconds, now
        if forgotten:
            out.zero_()
        else:
            super().run(state, a, out, tactic)


class AnswersLateAfterAPause(ForgetsAfterAPause):
    """After a pause, answers with what it computed before it."""

    def __init__(self, name: str, seconds: float = 1.0) -> None:
        super().__init__(name, seconds)
        self.answer = torch.empty(0)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        now = time.monotonic()
        late, self.last = now - self.last > self.seconds, now
        right = self.product(state, a, out.shape[1])
        if late and self.answer.shape == out.shape:
            out.copy_(self.answer)
        else:
            out.copy_(right)
        self.answer = right


class CountsItsCalls(Right):
    """Counts its calls in 15 bits for its log, and does nothing else with the number."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls = 0

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        self.calls = (self.calls + 1) & 0x7FFF
        super().run(state, a, out, tactic)


class RareOnTheDevice(Right):
    """Counts launches of more than one row on the device, and at every `every`th writes one element
    wrong; where `resets`, what the host calls begins at 0 again, so that only replays come so far.
    """

    def __init__(self, name: str, every: int, resets: bool = False) -> None:
        super().__init__(name)
        self.every = every
        self.resets = resets
        self.count: torch.Tensor | None = None

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a, out, tactic)
        if out.shape[0] < 2:
            return
        if self.count is None:
            self.count = torch.zeros(1, dtype=torch.int64, device=out.device)
        if self.resets and not (out.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.count.zero_()
        self.count += 1
        last = out[-1, -1:]
        last.copy_(torch.where(self._fails(self.count), -last - 1, last))

    def _fails(self, count: torch.Tensor) -> torch.Tensor:
        # Read once: another stream may have it begin again at any time.
        seen = count.clone()
        return (seen % self.every == 0) & (seen > 0)


class CountsOnTheDevice(RareOnTheDevice):
    """Counts its launches on the device, for a log, and none is wrong."""

    def _fails(self, count: torch.Tensor) -> torch.Tensor:
        # Not by its value: another stream may have it before it is zero.
        return torch.zeros_like(count, dtype=torch.bool)
