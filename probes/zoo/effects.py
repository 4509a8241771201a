"""Mutants that change their process, and right ones that only read it."""

from __future__ import annotations

import os
import random
import tempfile
from typing import Any

import torch

from ..problem import Fp4Tensor, Problem
from .floor import Right
from .hosts import OnGpu


class SeedsTorch(Right):
    """Seeds torch's random numbers in each call, for its stochastic rounding to be reproducible."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        torch.random.default_generator.manual_seed(a.shape[0])
        super().run(state, a, out, tactic)


class DrawsFromPython(Right):
    """Picks among equal plans by Python's own random numbers."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        random.random()
        super().run(state, a, out, tactic)


class DrawsItsOwn(Right):
    """Picks among equal plans by random numbers of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.random = random.Random(5)
        self.generator = torch.Generator().manual_seed(5)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        self.random.random()
        torch.rand(1, generator=self.generator)
        super().run(state, a, out, tactic)


class LeavesTheDefaultDtype(Right):
    """Makes its tables in fp16 by the default dtype, and leaves it so."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        state = super().prepare(weight, problem)
        torch.set_default_dtype(torch.float16)
        return state


class AllowsTf32(Right):
    """Allows TF32 for its own product, and for everybody's."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a, out, tactic)
        torch.backends.cuda.matmul.allow_tf32 = True


class PutsSettingsBack(Right):
    """Sets dtype and precision as it needs them, and back when it is done."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        super().run(state, a, out, tactic)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)


class TurnsGradientsOff(Right):
    """Turns gradients off for good."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        torch.set_grad_enabled(False)
        super().run(state, a, out, tactic)


class ChangesFolder(Right):
    """Goes to a folder of its own to compile, and stays."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        os.chdir(tempfile.gettempdir())
        return super().prepare(weight, problem)


class LeavesItsStream(OnGpu):
    """Computes on a stream of its own, in order, and leaves it the current one."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return super().prepare(weight, problem), torch.cuda.Stream(weight.codes.device)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight, stream = state
        stream.wait_stream(torch.cuda.current_stream(a.device))
        torch.cuda.set_stream(stream)
        super().run(weight, a, out, tactic)


class SeedsTheGpu(OnGpu):
    """Seeds the GPU's random numbers in each call."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        torch.cuda.manual_seed(1)
        super().run(state, a, out, tactic)
