"""What is multiplied: the operands of a problem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..problem import Fp4Tensor


class DrawnAgain(Protocol):
    """How the rows of an activation are drawn, as often as wanted; see `exact.Rows`."""

    def fill(self, a: torch.Tensor | Fp4Tensor, draw: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Operands:
    """The two operands of a problem, as drawn; ``out = global_scale * a @ weight.T``.

    a       (m, k) tensor in the problem's 16-bit dtype (activation ``bf16``), or an `Fp4Tensor`
    weight  `Fp4Tensor` (n, k)
    family  the name of the family they were drawn from; ``exact`` for an exact problem
    width   accumulator bits that make every order of summation exact; None for a family
    """

    a: torch.Tensor | Fp4Tensor
    weight: Fp4Tensor
    family: str
    width: int | None
    seed: int
    rows: DrawnAgain | None = None
    """How to draw other rows in place; None where that would take another weight."""


def window(operands: Operands, start: int, stop: int) -> Operands:
    """The smaller problem of rows [start, stop) of the activation; views, nothing is copied."""
    a = operands.a
    if isinstance(a, Fp4Tensor):
        cut = replace(a, codes=a.codes[start:stop], scales=a.scales[start:stop])
        return replace(operands, a=cut)
    return replace(operands, a=a[start:stop])
