"""Two backends with the faults fp4tune is made to find. Both give right answers most of the time.

Probe them to see what a report says:

    fp4tune probe --backend docs/examples/broken.py:Tail --shape 256,512
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fp4tune.probes.problem import Fp4Tensor, Problem

sys.path.insert(0, str(Path(__file__).parent))
from plain import Plain, Prepared  # noqa: E402

ROWS = 4
"""Rows of the tile that `Tail` believes every m is a multiple of."""


class Tail(Plain):
    """Writes whole tiles of rows only: with m = 6 the last two rows keep what was in memory."""

    name = "example-tail"

    def run(self, state: Prepared, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        whole = a.shape[0] // ROWS * ROWS
        super().run(state, a[:whole], out[:whole], tactic)


@dataclass(frozen=True, slots=True)
class Shared:
    prepared: Prepared
    workspace: torch.Tensor


class Scratch(Plain):
    """Keeps one workspace per weight: right on one stream, wrong where two calls overlap."""

    name = "example-scratch"

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Shared:
        workspace = torch.empty(problem.m, problem.k, device=weight.codes.device)
        return Shared(super().prepare(weight, problem), workspace)

    def run(self, state: Shared, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        activation = state.workspace[: a.shape[0]]
        activation.copy_(a)
        product = activation @ state.prepared.dequantised().T
        torch.mul(product, state.prepared.weight.global_scale, out=out)
