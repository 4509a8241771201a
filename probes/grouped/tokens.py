"""Routed tokens of exact problems, as often as wanted: activations, where they go, and what the
router weighs them with are drawn anew in place, and what must come of them is worked out there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.generator import below, hash_elements, hash_rows, mix, stream_key
from .problem import ExpertsProblem
from .reference import here, sums
from .routing import BEHIND, Routing, route
from .tensors import ExpertWeights, Routed
from .units import WIDTH, X, inverse_units

TERMS = 8
"""Activations of a token that are not zero."""
_FACTORS = (1.0, 2.0, 4.0, 8.0)
"""What a token's router weights are multiplied with: the weights of another are others."""


def draw_activations(x: torch.Tensor, key: int) -> None:
    """Fill x (rows, hidden): `TERMS` of each row are not zero, one of them among the last 32.

    Those in even columns, which gates read, are positive.
    """
    rows, k = x.shape
    device, terms = x.device, min(TERMS, k // 8)
    bits = hash_elements(rows, terms, mix(key + 5), device).long()
    starts = torch.arange(terms, device=device) * (k // terms)
    at = starts + (bits & 0x7FFFFF) % (k // terms)
    at[:, -1] = k - 32 + (bits[:, -1] & 31)
    at = at // 2 * 2 + torch.arange(terms, device=device) % 2
    negative = (at % 2 == 1) & ((bits >> 24) & 1 == 1)
    x.zero_().scatter_(1, at, torch.where(negative, -1.0, 1.0).mul(2.0**X).to(x.dtype))


@dataclass(frozen=True, slots=True)
class TokenRows:
    """How a pool of tokens is drawn: those of each draw are others, and the laws take turns.

    A row does not depend on how many there are.
    """

    problem: ExpertsProblem
    live: tuple[int, ...]
    """The experts that tokens may go to."""
    laws: tuple[str, ...]
    seed: int

    def law(self, draw: int) -> str:
        return self.laws[draw % len(self.laws)]

    def fill(self, a: Routed, draw: int) -> Routing:
        """Put the tokens of a draw where those of `a` are; enqueues only. Spoilt rows are as
        right as any other so far."""
        seed = self._seed(draw)
        device = a.x.device
        draw_activations(a.x, stream_key(seed, "tokens"))
        found = route(self.law(draw), len(a.x), self.live, self.problem.top_k, seed, device)
        a.ids.copy_(found.ids)
        a.ids.masked_fill_(a.ids == BEHIND, self.problem.groups)
        inverse = inverse_units(self.problem, device)
        there = (a.ids >= 0) & (a.ids < self.problem.groups)
        known = inverse[a.ids.long().clamp(0, self.problem.groups - 1)]
        a.weights.copy_(torch.where(there, known, 1.0) * self.factors(draw, len(a.x), device))
        return found

    def factors(self, draw: int, rows: int, device: torch.device | str) -> torch.Tensor:
        """float32 (rows, 1): what the router weights of each token are multiplied with."""
        bits = hash_rows(rows, stream_key(self._seed(draw), "factors"), device)
        table = torch.tensor(_FACTORS, dtype=torch.float32, device=device)
        return table[below(bits, 0, 16, len(_FACTORS)).long()].unsqueeze(1)

    def _seed(self, draw: int) -> int:
        return self.seed if draw == 0 else stream_key(self.seed, f"draw {draw}")


def at_rest(
    problem: ExpertsProblem, weights: ExpertWeights, live: tuple[int, ...]
) -> torch.Tensor | None:
    """float32 (experts, hidden): what each expert gives for a row of zeros; None for zeros, where
    there are no biases."""
    if not problem.act.biased:
        return None
    device = weights.codes.device
    every = torch.arange(problem.groups, dtype=torch.int32, device=device)
    idle = [e for e in range(problem.groups) if e not in set(live)]
    every[idle] = -1
    x = torch.zeros(problem.groups, problem.k, dtype=problem.dtype, device=device)
    ones = torch.ones(problem.groups, 1, dtype=torch.float32, device=device)
    alone = replace(problem, top_k=1, scaling=1.0)
    return sums(alone, weights, Routed(x, every.unsqueeze(1), ones)).total


def right_rows(
    problem: ExpertsProblem,
    weights: ExpertWeights,
    routed: Routed,
    factors: torch.Tensor,
    rest: torch.Tensor | None,
) -> torch.Tensor:
    """The output (tokens, hidden) in the problem's dtype, exact.

    Tokens whose sums would need more than `WIDTH` bits become zeros in place. `rest` is `at_rest`.
    """
    found = sums(problem, weights, routed)
    largest = found.size.amax(dim=1, keepdim=True) / (problem.scaling * factors)
    over = (largest > 2**WIDTH) | found.rough.unsqueeze(1)
    routed.x.masked_fill_(over, 0)
    return torch.where(over, resting(problem, routed, rest), found.total).to(problem.dtype)


def resting(
    problem: ExpertsProblem, routed: Routed, rest: torch.Tensor | None
) -> torch.Tensor | float:
    """float32 (tokens, hidden), or 0: what would come of these tokens if all were rows of zeros."""
    if rest is None:
        return 0.0
    there = here(problem, routed)
    total = torch.zeros(routed.x.shape, dtype=torch.float32, device=routed.x.device)
    for place in range(routed.ids.shape[1]):
        mine = there[:, place]
        each = rest[torch.where(mine, routed.ids[:, place], 0).long()]
        weight = torch.where(mine, routed.weights[:, place], 0.0).unsqueeze(1)
        total += torch.where(mine.unsqueeze(1), each * weight, 0.0)
    return total * problem.scaling


class Rests:
    """What would come of tokens of zeros, for sets of experts as they come."""

    def __init__(self, problem: ExpertsProblem) -> None:
        self._problem = problem
        self._known: dict[int, torch.Tensor | None] = {}
        """By the identity of a set of experts."""

    def of(self, weights: ExpertWeights, live: tuple[int, ...]) -> torch.Tensor | None:
        """`at_rest` of these experts."""
        if id(weights) not in self._known:
            self._known[id(weights)] = at_rest(self._problem, weights, live)
        return self._known[id(weights)]

    def __call__(self, case: Any, routed: Routed) -> torch.Tensor:
        """What comes of these tokens of a case if all are rows of zeros, in the dtype."""
        drawn = case.operands
        found = resting(self._problem, routed, self.of(drawn.weight, drawn.live))
        return torch.zeros_like(routed.x) + torch.as_tensor(found).to(routed.x.dtype)
