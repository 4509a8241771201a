"""Mutants that take their process with them, or never come back."""

from __future__ import annotations

import ctypes
import time
from itertools import count
from threading import Lock
from typing import Any

import torch

from ..problem import Fp4Tensor, Problem
from .floor import Right
from .hosts import OnGpu

BAD_M = 1
"""The m at which those that go by m do it."""


class Segfaults(Right):
    """Reads address 0 at one m."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        if a.shape[0] == BAD_M:
            ctypes.string_at(0)
        super().run(state, a, out, tactic)


class LoopsForever(Right):
    """Waits for a plan for one m, and there is none."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        while a.shape[0] == BAD_M:
            time.sleep(0.01)
        super().run(state, a, out, tactic)


class LocksInTurn(Right):
    """Takes two locks of the layer, every other call in the other order."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return super().prepare(weight, problem), (Lock(), Lock()), count()

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight, locks, calls = state
        first, second = locks if next(calls) % 2 else reversed(locks)
        with first:
            time.sleep(0.005)
            with second:
                super().run(weight, a, out, tactic)


class IllegalAddress(OnGpu):
    """Writes at an address that is none, at one m."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a, out, tactic)
        if a.shape[0] == BAD_M:
            from ._splitk_triton import write_anywhere

            write_anywhere[(1,)](64)


class EndlessKernel(OnGpu):
    """Waits on the GPU for a flag that nobody sets, at one m."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        flag = torch.zeros(1, dtype=torch.int32, device=weight.codes.device)
        return super().prepare(weight, problem), flag

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight, flag = state
        super().run(weight, a, out, tactic)
        if a.shape[0] == BAD_M:
            from ._splitk_triton import wait_forever

            wait_forever[(1,)](flag)


class LocksByM(Right):
    """Takes two locks that all layers have for an m, every other call in the other order."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.locks: dict[int, tuple[Lock, Lock]] = {}
        self.calls = count()

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        locks = self.locks.setdefault(a.shape[0], (Lock(), Lock()))
        first, second = locks if next(self.calls) % 2 else reversed(locks)
        with first:
            time.sleep(0.003)
            with second:
                super().run(state, a, out, tactic)
