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
