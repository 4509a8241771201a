"""Exact data for routed experts: every stage's results have at most 8 significant bits.

So a backend may keep what is between its stages in bf16 or in float32, add up in any order, and
still there is one right answer, bit for bit, of each stage and of all together. What makes it so:

* Gate values are 0 or at least 32, where float32's ``silu(x)`` is x, or beyond the limit of a
  clamped form: a token's activations are positive in the columns that gates read, and few.
* Each expert has units of its own: gate, up and down differ from the next expert's by two binades
  and more, and so do block scales and global scales. The router's weight takes an expert's unit
  back, so that what is added up has one.
* Experts that are *idle* have NaN in every scale and bias, and so has the memory behind the scales.

Two styles take turns: dense gates with a sparse w2, and sparse gates with a dense one. Both cannot
be dense, since sums would need more bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..check.reference import Expectation
from ..data.generator import below, hash_elements, mix, stream_key
from ..formats import pack
from ..problem import FORMATS, Format
from .problem import ExpertsProblem
from .reference import activate, here, slots_by_expert
from .tensors import ExpertWeights, Fp4Stack, Routed, matrix
from .tokens import TokenRows, at_rest, draw_activations, right_rows
from .units import WIDTH, X, simple_scaling, units_of

_SAMPLE = 64
_FITTING = 0.92
"""Tokens of a sample whose sums are to fit; those that do not fit are made zeros."""
_BEHIND = 1 << 12
"""Bytes of NaN behind a scale tensor."""
_NAN = {"e4m3": 0x7F, "e8m0": 0xFF}
_CODES = torch.tensor([[1, 2, 4, 6], [3, 5, 7, 6]], dtype=torch.uint8)
"""By exponent of the block's scale: the codes that make one unit, and three."""


@dataclass(frozen=True, slots=True)
class DrawnExperts:
    """Operands of grouped problems, as drawn; `width` and `rows` are as of dense ones.

    `law` is how tokens are routed at first, `live` the experts that any are routed to.
    """

    a: Routed
    weight: ExpertWeights
    family: str
    width: int | None
    seed: int
    law: str
    live: tuple[int, ...]
    rows: TokenRows | None = None


def draw_weights(
    problem: ExpertsProblem,
    seed: int,
    device: torch.device | str,
    live: Sequence[int],
    sparse_gates: bool,
) -> ExpertWeights:
    """The experts' weights; those that are not `live` have NaN for scales and biases."""
    fmt, key = FORMATS[problem.format], stream_key(seed, "experts")
    n, k, rows = problem.n, problem.k, problem.rows13
    act = problem.act
    # What a limited form gives has more bits, so there is less of it.
    dense, sparse = (1 / 2, 1 / 24) if act.gated and act.limit is None else (1 / 16, 1 / 64)
    gates = sparse if sparse_gates else dense
    ups = 0.75 if act.limit is None else 1 / 16
    first = torch.arange(rows, device=device) < n
    # Half of the columns are read by gates; without gates all rows are signed.
    even = torch.arange(k, device=device) % 2 == 0

    def mask13(bits: torch.Tensor) -> torch.Tensor:
        if not problem.act.gated:
            return ((bits >> 8) & 0xFFFF) < int(65536 * gates)
        share = torch.where(first, gates, ups).mul(65536).int().unsqueeze(1)
        here = ((bits >> 8) & 0xFFFF) < share
        return here & (even.unsqueeze(0) | ~first.unsqueeze(1))

    def exponents13(expert: int) -> torch.Tensor:
        gate = units_of(problem, expert).gate - X
        if not problem.act.gated:
            return torch.full((rows,), gate, device=device)
        return torch.where(first, gate, gate - 4)

    signed13 = ~first if problem.act.gated else torch.ones_like(first)
    w13 = _Matrix(fmt, (problem.groups, rows, k), mix(key + 1), mask13, exponents13, signed13)
    filled13 = w13.fill(
        device, shift=lambda e: units_of(problem, e).gate - X - 2 + _global_offset(e)
    )
    share = _share_of_w2(problem, filled13, live, seed)

    def mask2(bits: torch.Tensor) -> torch.Tensor:
        return ((bits >> 8) & 0xFFFF) < int(65536 * share)

    def exponents2(expert: int) -> torch.Tensor:
        return torch.full((k,), units_of(problem, expert).down, device=device)

    every = torch.ones(k, dtype=torch.bool, device=device)
    w2 = _Matrix(
        fmt, (problem.groups, k, n), mix(key + 2), mask2, exponents2, every, act.limit is None
    )
    filled2 = w2.fill(device, shift=lambda e: units_of(problem, e).down + _global_offset(2 * e + 1))
    b13, b2 = _biases(problem, key, device) if problem.act.biased else (None, None)
    made = ExpertWeights(filled13, filled2, b13, b2)
    _spoil(made, [e for e in range(problem.groups) if e not in set(live)])
    return made


def _global_offset(expert: int) -> int:
    return 2 * (expert % 3) - 2


def _biases(
    problem: ExpertsProblem, key: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, n = problem.groups, problem.n
    bits = hash_elements(groups, problem.rows13, mix(key + 7), device)
    gate = [units_of(problem, e).gate for e in range(groups)]
    unit = torch.tensor(gate, dtype=torch.float32, device=device).exp2().unsqueeze(1)
    b13 = ((bits & 0xFF) == 0) * unit
    up = ((bits & 0x3F) == 0) * unit / 16 * torch.where(bits < 0, -1.0, 1.0)
    b13[:, n:] = up[:, n:]
    bits = hash_elements(groups, problem.k, mix(key + 8), device)
    out = [units_of(problem, e).out for e in range(groups)]
    unit = torch.tensor(out, dtype=torch.float32, device=device).exp2().unsqueeze(1)
    return b13, (below(bits, 0, 8, 5) - 2) * unit


def _spoil(weights: ExpertWeights, idle: Sequence[int]) -> None:
    """Fill idle experts with NaN, in place."""
    for stack in (weights.w13, weights.w2):
        stack.scales[list(idle)] = _NAN[stack.format.scale]
        if stack.format.has_global:
            stack.global_scale[list(idle)] = torch.nan
    for bias in (weights.b13, weights.b2):
        if bias is not None:
            bias[list(idle)] = torch.nan


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix an expert: which elements are not zero, log2 of each row's unit, its signs."""

    format: Format
    shape: tuple[int, int, int]
    key: int
    mask: Callable[[torch.Tensor], torch.Tensor]
    exponents: Callable[[int], torch.Tensor]
    signed: torch.Tensor
    threes: bool = True
    """Whether one element in eight is three units."""

    def fill(self, device: torch.device | str, shift: Callable[[int], int]) -> Fp4Stack:
        """DrawnExperts; `shift` is log2 of each expert's global scale, where the format has one."""
        groups, rows, k = self.shape
        fmt, blocks = self.format, k // self.format.block
        codes = torch.empty(groups, rows, k // 2, dtype=torch.uint8, device=device)
        memory = torch.full(
            (groups * rows * blocks + _BEHIND,), _NAN[fmt.scale], dtype=torch.uint8, device=device
        )
        scales = memory[: groups * rows * blocks].view(groups, rows, blocks)
        table = _CODES.to(device)
        global_scale = torch.ones(groups, dtype=torch.float32, device=device)
        for expert in range(groups):
            bits = hash_elements(rows, k, self.key, device, expert * rows)
            of_block = hash_elements(rows, blocks, mix(self.key + 4), device, expert * rows)
            step = below(of_block, 0, 16, 4)
            exponent = self.exponents(expert).unsqueeze(1) - (step - 1)
            if fmt.has_global:
                exponent = exponent - shift(expert)
                global_scale[expert] = 2.0 ** shift(expert)
                scales[expert] = ((exponent + 7) << 3).to(torch.uint8)
            else:
                scales[expert] = (exponent + 127).to(torch.uint8)
            three = ((bits & 7) == 0).long() if self.threes else torch.zeros_like(bits).long()
            size = table[three, step.long().repeat_interleave(fmt.block, dim=1)]
            size = size * self.mask(bits)
            negative = (bits < 0) & self.signed.unsqueeze(1)
            codes[expert] = pack(size | (negative.to(torch.uint8) << 3))
        return Fp4Stack(fmt, codes, scales, global_scale)


def _share_of_w2(problem: ExpertsProblem, w13: Fp4Stack, live: Sequence[int], seed: int) -> float:
    """How many elements of w2 may differ from zero, so that nearly all sums fit in `WIDTH` bits:
    found on some tokens and columns, by halves."""
    device = w13.codes.device
    x = torch.empty(_SAMPLE, problem.k, device=device)
    draw_activations(x, stream_key(seed, "sample"))
    columns = min(problem.k, 1024)
    sizes, bits = [], []
    for place, expert in enumerate(live[: problem.top_k]):
        h13 = x @ matrix(w13, expert, torch.float32).T
        h = (
            activate(h13.double(), problem.act, problem.n).abs()
            / 2.0 ** units_of(problem, expert).h
        )
        sizes.append(h.float())
        key = stream_key(seed, f"sample {place}")
        bits.append(hash_elements(columns, problem.n, key, device))
    low, high = 0.0, 0.75
    for _ in range(10):
        share = (low + high) / 2
        total = torch.zeros(_SAMPLE, columns, device=device)
        for h, drawn in zip(sizes, bits, strict=True):
            here = ((drawn >> 8) & 0xFFFF) < int(65536 * share)
            three = ((drawn & 7) == 0) & (problem.act.limit is None)
            total += h @ torch.where(here, 1.0 + 2.0 * three, 0.0).T
        largest = total.amax(dim=1).sort().values[int(_SAMPLE * _FITTING)]
        low, high = (share, high) if float(largest) <= 2**WIDTH else (low, share)
    return max(low, 1.5 / 65536)


def draw_tokens(
    problem: ExpertsProblem,
    weights: ExpertWeights,
    live: Sequence[int],
    laws: Sequence[str],
    seed: int,
    family: str = "exact",
) -> tuple[DrawnExperts, Expectation]:
    """`problem.m` tokens routed by the first of `laws` among `live`, and the right answer to each;
    with several, drawn anew they take turns (`TokenRows`).

    Tokens whose sums would need more bits are made zeros. `problem.scaling` is a power of two: see
    `simple_scaling`.
    """
    device, m = weights.codes.device, problem.m
    rows = TokenRows(problem, tuple(live), tuple(laws), seed)
    routed = Routed(
        torch.empty(m, problem.k, dtype=problem.dtype, device=device),
        torch.empty(m, problem.top_k, dtype=torch.int32, device=device),
        torch.empty(m, problem.top_k, dtype=torch.float32, device=device),
    )
    spoilt = rows.fill(routed, 0).spoilt.unsqueeze(1)
    if bool(spoilt.any()):
        routed = replace(routed, spoilt=spoilt)
    rest = at_rest(problem, weights, tuple(live))
    right = right_rows(problem, weights, routed, rows.factors(0, m, device), rest)
    if routed.spoilt is not None:
        routed.x.masked_fill_(spoilt, torch.nan)
        routed.weights.masked_fill_(spoilt, torch.nan)
    again = rows if len(laws) > 1 else None
    drawn = DrawnExperts(routed, weights, family, WIDTH, seed, laws[0], tuple(live), again)
    return drawn, Expectation(right, right, exact=True)


@dataclass(frozen=True, slots=True)
class Stages:
    """What is between the stages for some tokens, in the problem's dtype; slots of experts that are
    elsewhere hold zeros and `here` (tokens, top_k) is false."""

    h13: torch.Tensor
    h: torch.Tensor
    y: torch.Tensor
    here: torch.Tensor


def stages(problem: ExpertsProblem, weights: ExpertWeights, routed: Routed) -> Stages:
    """Of these tokens: gemm1 (tokens, top_k, rows of w13), activation (.., n), gemm2 (.., k)."""
    shape = (len(routed.x) + 1, routed.ids.shape[1])
    h13 = routed.x.new_zeros(*shape, problem.rows13)
    h = routed.x.new_zeros(*shape, problem.n)
    y = routed.x.new_zeros(*shape, problem.k)
    for mine in slots_by_expert(problem, weights, routed):
        at = mine.tokens, mine.places
        h13[at], h[at], y[at] = (v.to(problem.dtype) for v in (mine.h13, mine.h, mine.y))
    return Stages(h13[:-1], h[:-1], y[:-1], here(problem, routed))


def exact_problem(problem: ExpertsProblem) -> ExpertsProblem:
    """The problem with the scaling that exact data have."""
    return replace(problem, scaling=simple_scaling(problem.scaling))
