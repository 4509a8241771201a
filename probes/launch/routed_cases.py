"""Cases of routed experts that stand by themselves: where a layer that is open has none."""

from __future__ import annotations

from typing import Any

import torch

from ..check.reference import Expectation
from ..check.sweep import Unchanged
from ..grouped.backend import AsDense
from ..grouped.exact import DrawnExperts, draw_tokens, draw_weights
from ..grouped.problem import ExpertsProblem
from ..grouped.tensors import ExpertWeights, Fp4Stack, Routed
from ..problem import FORMATS, Problem
from .case import Case, blame, tensors


def seen_as_dense(problem: ExpertsProblem) -> Problem:
    """A layer as regimes see it: hidden size from hidden size."""
    return Problem(problem.format, problem.m, problem.k, problem.k, "bf16", problem.out_dtype)


def balanced_case(
    backend: AsDense, problem: ExpertsProblem, seed: int, device: torch.device | str
) -> Case:
    """Exact data of `problem.m` tokens, as many for each expert as can be."""
    every = range(problem.groups)
    weights = draw_weights(problem, seed, device, every, sparse_gates=False)
    drawn, right = draw_tokens(problem, weights, every, ("balanced",), seed)
    return prepared_case(backend, problem, drawn, right)


def uniform_case(backend: AsDense, problem: ExpertsProblem, device: torch.device | str) -> Case:
    """Experts and tokens of no matter which values, in few allocations; nothing is expected."""
    fmt = FORMATS[problem.format]
    one = 0x38 if fmt.scale == "e4m3" else 127

    def stack(rows: int, k: int) -> Fp4Stack:
        shape = problem.groups, rows
        return Fp4Stack(
            fmt,
            torch.full((*shape, k // 2), 0x21, dtype=torch.uint8, device=device),
            torch.full((*shape, k // fmt.block), one, dtype=torch.uint8, device=device),
            torch.ones(problem.groups, device=device),
        )

    def bias(rows: int) -> torch.Tensor | None:
        return torch.zeros(problem.groups, rows, device=device) if problem.act.biased else None

    rows13, k = problem.rows13, problem.k
    weights = ExpertWeights(stack(rows13, k), stack(k, problem.n), bias(rows13), bias(k))
    slots = torch.arange(problem.m * problem.top_k, dtype=torch.int32, device=device)
    ids = (slots % problem.groups).view(problem.m, problem.top_k)
    x = torch.ones(problem.m, problem.k, dtype=problem.dtype, device=device)
    routed = Routed(x, ids, torch.ones(ids.shape, device=device))
    nothing = torch.zeros_like(x)
    live = tuple(range(problem.groups))
    drawn = DrawnExperts(routed, weights, "none", None, 0, "balanced", live)
    return prepared_case(backend, problem, drawn, Expectation(nothing, nothing, exact=False))


def prepared_case(
    backend: AsDense, problem: ExpertsProblem, drawn: DrawnExperts, right: Expectation
) -> Case:
    """These experts as the backend prepares them, and these tokens."""
    with blame(backend):
        state = backend.prepare(drawn.weight, problem)
    operands: Any = drawn
    inputs = [*tensors(drawn.weight), *tensors(drawn.a)]
    return Case(seen_as_dense(problem), operands, right, state, Unchanged(inputs))
