"""The units that exact data of routed experts are made of: each expert has its own."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

import torch

from .problem import ExpertsProblem

WIDTH = 8
"""Significant bits of every sum."""
X = 3
"""log2 of the magnitude of activations that are not zero."""


@dataclass(frozen=True, slots=True)
class Units:
    """log2 of the unit of one expert's gates, its activations and its w2."""

    gate: int
    h: int
    down: int

    @property
    def out(self) -> int:
        return self.h + self.down


def units_of(problem: ExpertsProblem, expert: int) -> Units:
    """The units of an expert; those of the next one are at least two binades away."""
    gate = 5 + 2 * ((expert + expert // 4) % 4)
    act = problem.act
    # Beyond the limit an activation no longer grows with its expert's unit. Ups are even.
    limited = 0 if act.offset else 2
    h = 2 * gate if not act.gated else limited if act.limit is not None else 2 * gate - 4
    return Units(gate, h, -4 - 2 * (expert % 3))


def inverse_units(problem: ExpertsProblem, device: torch.device | str) -> torch.Tensor:
    """float32 (experts,): what takes an expert's unit back out of what it gives."""
    values = [2.0 ** -units_of(problem, expert).out for expert in range(problem.groups)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def simple_scaling(scaling: float) -> float:
    """The power of two nearest to a routed scaling, and not 1 unless that is 1: what exact data are
    scaled by, so that results keep their bits. A backend takes it as a number like any other."""
    if scaling == 1:
        return 1.0
    exponent = round(log2(scaling))
    return 2.0 ** (exponent or (1 if scaling > 1 else -1))
