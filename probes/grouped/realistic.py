"""Routed experts of realistic values: what exact data, by being exact, cannot show.

Exact gates are 0 or at least 32, where any activation is its argument; exact tokens are powers of
two, and so are scales. Here gates lie where the activation bends, tokens and the router's weights
have all their bits, and the routed scaling is the model's own. Judged tile by tile, since a backend
may round what is between its stages.
"""

from __future__ import annotations

from dataclasses import replace
from math import hypot, sqrt

import torch

from ..check.reference import Expectation
from ..check.tiles import tile_limit
from ..data import FAMILIES, draw
from ..data.blocks import normal_matrix
from ..data.generator import hash_elements, hash_rows, mix, stream_key
from ..formats import dequantise
from ..problem import FORMATS, Fp4Tensor, Problem
from .exact import DrawnExperts
from .problem import ExpertsProblem
from .reference import sums
from .routing import route
from .tensors import ExpertWeights, Fp4Stack, Routed

NAMES = ("realistic", "min-normal-scales", "subnormal-scales")
"""Families of dense data that experts' matrices are drawn by."""
_DIFFERENT = 8
"""Matrices that are drawn; other experts have these with their rows moved."""
_BEND = 2.0
"""The deviation of gates where nothing limits them; else half of the limit."""
_BIAS = 0.5


def error_limit(problem: ExpertsProblem) -> float:
    """The largest relative Frobenius error of a right tile: both GEMMs may add up in short sums."""
    return hypot(tile_limit(problem.k), tile_limit(problem.n))


def families_of(problem: ExpertsProblem) -> tuple[str, ...]:
    """The names of `NAMES` that exist in the problem's format, without a condition first."""
    return tuple(name for name in NAMES if problem.format in FAMILIES[name].formats)


def draw_realistic(
    problem: ExpertsProblem, family: str, seed: int, device: torch.device | str, law: str
) -> tuple[DrawnExperts, Expectation]:
    """`problem.m` tokens and experts of a family, every expert among those chosen from; `ref` is
    float32, and any finite value lies between `lo` and `hi`."""
    w13 = _stack(problem, family, (problem.rows13, problem.k), stream_key(seed, "w13"), device)
    w2 = _stack(problem, family, (problem.k, problem.n), stream_key(seed, "w2"), device)
    b13, b2 = (
        _BIAS * normal_matrix(problem.groups, rows, stream_key(seed, name), device)
        if problem.act.biased
        else None
        for rows, name in ((problem.rows13, "b13"), (problem.k, "b2"))
    )
    weights = ExpertWeights(w13, w2, b13, b2)
    x = normal_matrix(problem.m, problem.k, stream_key(seed, "x"), device)
    x *= (problem.act.limit or 2 * _BEND) / 2 / (_deviation(w13) * sqrt(problem.k))
    ids = route(law, problem.m, range(problem.groups), problem.top_k, seed, device).ids
    router = _router(ids.shape, stream_key(seed, "router"), device)
    routed = Routed(x.to(problem.dtype), ids, router)
    ref = sums(problem, weights, routed).total
    most = torch.finfo(problem.dtype).max
    hi = torch.full_like(routed.x, most)
    live = tuple(range(problem.groups))
    drawn = DrawnExperts(routed, weights, family, None, seed, law, live)
    return drawn, Expectation(-hi, hi, exact=False, ref=ref)


def _stack(
    problem: ExpertsProblem,
    family: str,
    shape: tuple[int, int],
    key: int,
    device: torch.device | str,
) -> Fp4Stack:
    rows, k = shape
    alone = Problem(problem.format, 1, rows, k)
    count = min(_DIFFERENT, problem.groups)
    drawn = [draw(alone, family, mix(key + index), device).weight for index in range(count)]
    shifts = hash_rows(problem.groups, mix(key + 99), "cpu").tolist()
    moved = [_shifted(drawn[e % count], shifts[e] % rows) for e in range(problem.groups)]
    return Fp4Stack(
        FORMATS[problem.format],
        torch.stack([each.codes for each in moved]),
        torch.stack([each.scales for each in moved]),
        torch.stack([each.global_scale for each in moved]),
    )


def _shifted(weight: Fp4Tensor, shift: int) -> Fp4Tensor:
    codes, scales = (t.roll(shift, 0) for t in (weight.codes, weight.scales))
    return replace(weight, codes=codes, scales=scales)


def _deviation(stack: Fp4Stack) -> float:
    """The root mean square of the first expert's values."""
    return float(dequantise(stack.expert(0)).square().mean().sqrt())


def _router(shape: torch.Size, key: int, device: torch.device | str) -> torch.Tensor:
    """float32 (tokens, top_k): shares of 1, none of them small."""
    tokens, top_k = shape
    bits = hash_elements(tokens, top_k, key, device) & 0xFFFF
    share = 0.25 + bits.float() / 65536
    return share / share.sum(dim=1, keepdim=True).clamp(min=0.25)
