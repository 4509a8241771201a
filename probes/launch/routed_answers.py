"""The right answers to routed tokens that are drawn anew (`launch.redraw`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data.generator import mix
from ..grouped.problem import ExpertsProblem
from ..grouped.reference import token64
from ..grouped.tokens import Rests, TokenRows, right_rows
from .case import Case

_SAMPLED_COLUMNS = 64
"""Of one token of each draw, so many elements of the answer are computed in float64 as well."""


class RoutedAnswers:
    """The answers to cases of routed tokens, by `reference`, sampled in every draw."""

    def __init__(self, problem: ExpertsProblem, cases: Sequence[Case]) -> None:
        self._problem = problem
        self._cases = cases
        self._rests = Rests(problem)

    def refresh(self, index: int, draw: int) -> torch.Tensor:
        """As `launch.redraw.Answers` has it."""
        case = self._cases[index]
        drawn: Any = case.operands
        rows: TokenRows = drawn.rows
        routed, lo = drawn.a, case.expectation.lo
        rest = self._rests.of(drawn.weight, drawn.live)
        factors = rows.factors(draw, len(routed.x), lo.device)
        lo.copy_(right_rows(self._problem, drawn.weight, routed, factors, rest))
        if not len(lo):
            return torch.zeros((), dtype=torch.int64, device=lo.device)
        at = mix(drawn.seed ^ mix(draw))
        token = torch.tensor([at % len(lo)], device=lo.device)
        columns = torch.arange(_SAMPLED_COLUMNS, device=lo.device) * mix(at + 2) + at
        columns = columns % self._problem.k
        right = token64(self._problem, drawn.weight, routed, token, columns)
        return (lo[token][0, columns] != right).sum()
