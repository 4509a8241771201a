"""What routed experts compute, expert by expert, on the device of their weights.

A plain float32 product of dequantised operands, without tensor cores: exact on the data of `exact`,
where no sum has more than 8 significant bits. It shares no kernel, permutation or data type with
what it judges. The host learns how many slots each expert has, and waits for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..check.reference import without_tensor_cores
from ..check.rounding import round_nearest
from ..formats import dequantise
from ..problem import Fp4Tensor
from .problem import ExpertsProblem, Gate
from .tensors import ExpertWeights, Fp4Stack, Routed

_SIGMOID = 2.0**-13
"""What a clamped form's sigmoid may be away from 1: far below half a unit in bf16's last place."""
_WEIGHTS, _ROWS = 1 << 26, 1 << 26
"""Elements of dequantised weights, and of what is computed with them, at once: a dozen workers
share a GPU's memory."""


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
    """What some experts do with their slots (token, place in top-k), each expert's slots padded to
    as many.

    tokens, places  int64 (experts, slots); a slot of padding is of the token behind the last
    h13, h, y       float32 (experts, slots, ...): behind gemm1, the activation and gemm2
    size            float32, like y: ``sum |h| |w2|``, with the bias's size
    rough           bool (experts, slots): what gemm1 or the activation gives is none of the dtype's
                    values, but for a sigmoid's last bits
    """

    tokens: torch.Tensor
    places: torch.Tensor
    h13: torch.Tensor
    h: torch.Tensor
    y: torch.Tensor
    size: torch.Tensor
    rough: torch.Tensor


def matrices(stack: Fp4Stack, experts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values (experts, rows, k) of some experts' matrices, global scales included."""
    codes, scales = stack.codes[experts], stack.scales[experts]
    flat = Fp4Tensor(stack.format, codes.flatten(0, 1), scales.flatten(0, 1), stack.global_scale)
    values = dequantise(flat, dtype, with_global=False).view(*codes.shape[:2], -1)
    return values * stack.global_scale[experts].to(dtype).view(-1, 1, 1)


def slots_by_expert(
    problem: ExpertsProblem, weights: ExpertWeights, routed: Routed
) -> Iterator[Slots]:
    """Every expert that has a token, several at a time, those with the most first."""
    groups, top_k, device = problem.groups, routed.ids.shape[1], routed.ids.device
    key = torch.where(here(problem, routed), routed.ids.long(), groups).flatten()
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=groups + 1)[:groups]
    first = counts.cumsum(0) - counts
    host = counts.tolist()
    busy = sorted((e for e in range(groups) if host[e]), key=lambda e: -host[e])
    while busy:
        most = host[busy[0]]
        room = min(_WEIGHTS // (problem.rows13 * problem.k), _ROWS // (most * problem.rows13))
        chosen, busy = busy[: max(1, room)], busy[max(1, room) :]
        experts = torch.tensor(chosen, device=device)
        place = torch.arange(most, device=device)
        there = place < counts[experts].unsqueeze(1)
        at = (first[experts].unsqueeze(1) + place).clamp(max=max(0, order.numel() - 1))
        slot = torch.where(there, order[at], routed.ids.numel())
        yield _worked_out(problem, weights, routed, experts, (slot // top_k, slot % top_k))


def here(problem: ExpertsProblem, routed: Routed) -> torch.Tensor:
    """bool (tokens, top_k): slots of experts that are here, of rows that are asked for."""
    found = (routed.ids >= 0) & (routed.ids < problem.groups)
    return found if routed.spoilt is None else found & ~routed.spoilt


def _worked_out(
    problem: ExpertsProblem,
    weights: ExpertWeights,
    routed: Routed,
    experts: torch.Tensor,
    at: tuple[torch.Tensor, torch.Tensor],
) -> Slots:
    tokens, places = at
    x = torch.cat((routed.x.float(), routed.x.new_zeros(1, problem.k).float()))[tokens]
    with without_tensor_cores():
        h13 = x @ matrices(weights.w13, experts, torch.float32).transpose(1, 2)
        if weights.b13 is not None:
            h13 += weights.b13[experts].unsqueeze(1)
        wide = activate(h13.double(), problem.act, problem.n)
        h = wide.float().to(problem.dtype).float()
        rough = ((h - wide).abs() > wide.abs() * _SIGMOID).any(dim=2)
        rough |= (h13 != h13.to(problem.dtype).float()).any(dim=2)
        w2 = matrices(weights.w2, experts, torch.float32).transpose(1, 2)
        y, size = h @ w2, h.abs() @ w2.abs()
    if weights.b2 is not None:
        y += weights.b2[experts].unsqueeze(1)
        size += weights.b2[experts].abs().unsqueeze(1)
    return Slots(tokens, places, h13, h, y, size, rough)


@dataclass(frozen=True, slots=True)
class TokenSums:
    """What comes of each token, float32 (tokens, hidden), weighed by the router and scaled; its
    size, likewise; and whether any of its slots is `rough`, bool (tokens,)."""

    total: torch.Tensor
    size: torch.Tensor
    rough: torch.Tensor


def sums(problem: ExpertsProblem, weights: ExpertWeights, routed: Routed) -> TokenSums:
    """Every token's sum; those of spoilt rows are zero."""
    count, device = len(routed.x), routed.x.device
    total, size = (
        torch.zeros(count + 1, problem.k, dtype=torch.float32, device=device) for _ in range(2)
    )
    rough = torch.zeros(count + 1, dtype=torch.int32, device=device)
    router = torch.cat((routed.weights, routed.weights.new_zeros(1, routed.weights.shape[1])))
    for mine in slots_by_expert(problem, weights, routed):
        tokens = mine.tokens.flatten()
        weight = router[mine.tokens, mine.places].unsqueeze(2)
        total.index_add_(0, tokens, (weight * mine.y).flatten(0, 1))
        size.index_add_(0, tokens, (weight * mine.size).flatten(0, 1))
        rough.index_add_(0, tokens, mine.rough.int().flatten())
    return TokenSums(total[:-1] * problem.scaling, size[:-1] * problem.scaling, rough[:-1] > 0)


def rows_out(problem: ExpertsProblem, weights: ExpertWeights, routed: Routed) -> torch.Tensor:
    """The layer's output (tokens, hidden), correctly rounded; spoilt rows are zero."""
    return round_nearest(sums(problem, weights, routed).total.double(), problem.dtype)


def token64(
    problem: ExpertsProblem,
    weights: ExpertWeights,
    routed: Routed,
    token: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor:
    """Some columns of one token's output in float64, slot by slot, rounded to the dtype.

    token int64 (1,) and columns int64 (c,) on the device; enqueues only.
    """
    x = routed.x[token].double()
    total = torch.zeros(len(columns), dtype=torch.float64, device=x.device)
    for place in range(routed.ids.shape[1]):
        expert = routed.ids[token, place].long()
        there = (expert >= 0) & (expert < problem.groups)
        if routed.spoilt is not None:
            there = there & ~routed.spoilt[token, 0]
        expert = torch.where(there, expert, 0)
        h13 = (x @ matrices(weights.w13, expert, torch.float64)[0].T)[0]
        if weights.b13 is not None:
            h13 = h13 + weights.b13[expert][0].double()
        h = activate(h13, problem.act, problem.n).float().to(problem.dtype).double()
        w2 = weights.w2
        part = Fp4Tensor(
            w2.format, w2.codes[expert, columns], w2.scales[expert, columns], w2.global_scale
        )
        y = dequantise(part, torch.float64, with_global=False) @ h
        y = y * w2.global_scale[expert].double()
        if weights.b2 is not None:
            y = y + weights.b2[expert, columns].double()
        weight = routed.weights[token, place].double()
        total += torch.where(there, weight * y, 0.0)
    return round_nearest(total * problem.scaling, problem.dtype)
