"""Backends that return their output: in memory of its own, or in that of an earlier one."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch

from ..backends.torch.dequant import not_dense, torch_dequant
from ..problem import Device, Fp4Tensor, Problem


class ReturnsItsOutput:
    """Right in everything: a new output for each call."""

    activation = "bf16"
    layout = "plain"
    distributions: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.floor = torch_dequant()

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return not_dense(self.floor, problem)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return self.floor.prepare(weight, problem), weight.shape[0]

    def output(self, a: torch.Tensor, n: int) -> torch.Tensor:
        """Memory for an output."""
        return torch.empty(a.shape[0], n, dtype=a.dtype, device=a.device)

    def matmul(self, state: Any, a: torch.Tensor, tactic: str) -> torch.Tensor:
        """The product of a (m, k) and the weight, (m, n) in the activation's dtype."""
        own, n = state
        out = self.output(a, n)
        self.floor.run(own, a, out, "fp32")
        return out


class RingOfOutputs(ReturnsItsOutput):
    """Returns one of `size` outputs of each shape, in turn."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name)
        self.size = size
        self.calls = count()
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}

    def output(self, a: torch.Tensor, n: int) -> torch.Tensor:
        key = (next(self.calls) % self.size, a.shape[0], n)
        if key not in self.kept:
            self.kept[key] = super().output(a, n)
        return self.kept[key]
