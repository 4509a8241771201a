"""What routed experts compute, expert by expert, on the device of their weights.

A plain float32 product of dequantised operands: exact on the data of `exact`, where no sum has more
than 8 significant bits. It shares no kernel, permutation or data type with what it judges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..check.reference import without_tensor_cores
from ..check.rounding import round_nearest
from .problem import ExpertsProblem, Gate
from .tensors import ExpertWeights, Routed, matrix

_SIGMOID = 2.0**-13
"""What a clamped form's sigmoid may be away from 1: far below half a unit in bf16's last place."""


def activate(h13: torch.Tensor, gate: Gate, n: int) -> torch.Tensor:
    """The activation of float64 gemm1 results (..., rows of w13), as float64 (..., n)."""
    if not gate.gated:
        return h13.clamp(min=0).square()
    g, u = h13[..., :n], h13[..., n:]
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return g * torch.sigmoid(gate.alpha * g) * (u + gate.offset)


@dataclass(frozen=True, slots=True)
class Slots:
    """What one expert does: the slots (token, place in top-k) that are its own, int64 each, and
    its results in float32 before and after the activation and behind gemm2."""

    tokens: torch.Tensor
    places: torch.Tensor
    h13: torch.Tensor
    h: torch.Tensor
    y: torch.Tensor
    size: torch.Tensor
    """``sum |h| |w2|`` of each result of gemm2, with the bias's size; infinite where what gemm1 or
    the activation gives is none of the dtype's values, but for a sigmoid's last bits."""


def expert_by_expert(
    problem: ExpertsProblem, weights: ExpertWeights, routed: Routed
) -> Iterator[Slots]:
    """Every expert that has a token, in ascending order."""
    ids = routed.ids
    for expert in range(problem.groups):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        if routed.spoilt is not None:
            kept = ~routed.spoilt[tokens, 0]
            tokens, places = tokens[kept], places[kept]
        if not tokens.numel():
            continue
        with without_tensor_cores():
            h13 = routed.x[tokens].float() @ matrix(weights.w13, expert, torch.float32).T
            if weights.b13 is not None:
                h13 += weights.b13[expert]
            wide = activate(h13.double(), problem.act, problem.n)
            h = wide.float().to(problem.dtype).float()
            off = ((h - wide).abs() > wide.abs() * _SIGMOID).any(dim=1)
            off |= (h13 != h13.to(problem.dtype).float()).any(dim=1)
            w2 = matrix(weights.w2, expert, torch.float32).T
            y, size = h @ w2, h.abs() @ w2.abs()
            if weights.b2 is not None:
                y += weights.b2[expert]
                size += weights.b2[expert].abs()
            size[off] = torch.inf
        yield Slots(tokens, places, h13, h, y, size)


def rows_out(
    problem: ExpertsProblem, weights: ExpertWeights, routed: Routed
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output (tokens, hidden), correctly rounded, and the largest sum of sizes in each
    row, float32 (tokens,), weighed by the router; spoilt rows are zero."""
    total = torch.zeros(routed.x.shape, dtype=torch.float32, device=routed.x.device)
    sizes = torch.zeros_like(total)
    for mine in expert_by_expert(problem, weights, routed):
        weight = routed.weights[mine.tokens, mine.places].unsqueeze(1)
        total.index_add_(0, mine.tokens, weight * mine.y)
        sizes.index_add_(0, mine.tokens, weight * mine.size)
    rounded = round_nearest(total.double() * problem.scaling, problem.dtype)
    return rounded, sizes.amax(dim=1) if sizes.numel() else sizes.new_zeros(len(sizes))
