"""What mutants of the floor share: a right GEMM in plain torch, on a CPU or a GPU, to go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..backends.dequant import not_dense, torch_dequant
from ..problem import Device, Fp4Tensor, Problem


class Right:
    """Right in everything: the floor, multiplied in fp32, under a name of its own."""

    activation = "bf16"
    layout = "plain"
    distributions: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.floor = torch_dequant()

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return not_dense(self, problem)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return self.floor.prepare(weight, problem)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        self.floor.run(state, a, out, "fp32")

    def product(self, state: Any, a: torch.Tensor, n: int) -> torch.Tensor:
        """The right answer (m, n), in memory of its own."""
        out = torch.empty(a.shape[0], n, dtype=a.dtype, device=a.device)
        self.floor.run(state, a, out, "fp32")
        return out


def decoded(state: Any) -> torch.Tensor:
    """The weight of a floor's state without its global scale, (n, k) fp32."""
    tensor: torch.Tensor = state.decoders["fp32"](state.tensor)
    return tensor


def partial_products(
    state: Any, a: torch.Tensor, step: int, parts: list[int] | None = None
) -> Iterator[torch.Tensor]:
    """Products (m, n) in fp32 over `step` elements along k each, without the global scale.

    `parts` gives the order; without it they come in order.
    """
    weight = decoded(state)
    for part in range(-(-a.shape[1] // step)) if parts is None else parts:
        k = slice(part * step, (part + 1) * step)
        yield a[:, k].float() @ weight[:, k].t()
