"""A backend's own quantiser, judged by value: what the GEMM behind it reads of each element.

What `quantise` returns is the backend's affair. A weight of one 1 in each row makes the output a
copy of the activation as it was dequantised, element by element.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...backends import Backend
from ...check.sweep import SlotReport
from ...data.activations import ACTIVATIONS
from ...data.generator import stream_key
from ...formats import GSF_NUMERATOR, decode_scale, encode_e2m1, quantise
from ...launch.case import Case, Launch, blame, own_quantiser, quantise_and_run
from ...launch.outcome import Budget, NotApplicable, Outcome, device_of, poison, wait
from ...problem import FORMATS, Format, Fp4Tensor, Problem

_MOST_ROWS = 130
_MOST_PARTS = 4
"""Weights of n ones, each of which shows n columns of the activation."""
_TIE = 2.0**-16
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ONE = {"e4m3": 7 << 3, "e8m0": 127}


def own_quantiser_values(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Activations of every kind through the backend's own `quantise` and its GEMM, at every m.

    Each has a global scale of its own, by its largest value. An element must be one nearest to what
    it was under a block scale that is ours, or the code next to it; see `quantisers` for why.
    """
    if own_quantiser(backend) is None:
        raise NotApplicable("the backend has no quantiser of its own")
    device = device_of(cases)
    problem = cases[0].problem
    start = time.perf_counter()
    shows = [_ones(problem, part, device) for part in range(_parts(problem))]
    with blame(backend):
        states = [backend.prepare(weight, problem) for weight in shows]
    errors: dict[int, dict[str, str]] = {}
    calls = blocks = 0
    chosen = [x for x in launches if 0 < x.m <= _MOST_ROWS]
    for launch in chosen:
        for kind in ACTIVATIONS:
            x, scale = _activation_and_scale(problem, launch, kind, device)
            seen = [
                _seen(backend, _Shown(state, problem.n), x, scale, launch.tactic)
                for state in states
            ]
            calls += len(states)
            columns = _columns(problem)
            read = torch.cat(seen, dim=1)[:, :columns]
            wrong = judge(x[:, :columns], read, scale, FORMATS[problem.format])
            blocks += wrong.numel()
            if bool(wrong.any()) and launch.item not in errors:
                row, block = wrong.nonzero()[0].tolist()
                text = (
                    f"its own quantiser: {int(wrong.sum())} of {wrong.numel()} blocks of {kind} "
                    f"activations are not what they should be at m={launch.m}, the first in row "
                    f"{row}, block {block}"
                )
                errors[launch.item] = {"kind": "wrong", "message": text}
        budget.beat()
    clean = SlotReport(0, 0, 0, 0, 0, None, ())
    return Outcome(
        repeats=len(ACTIVATIONS),
        reports=tuple((launch, clean) for launch in chosen),
        changed_inputs=0,
        seconds=time.perf_counter() - start,
        proof={"calls": calls, "blocks": blocks, "columns": _columns(problem)},
        errors=errors,
        exempt=_left_out(launches, chosen),
    )


def _left_out(launches: Sequence[Launch], chosen: Sequence[Launch]) -> dict[int, str]:
    """The items of which no launch was chosen."""
    tried = {launch.item for launch in chosen}
    why = f"no m of it is from 1 to {_MOST_ROWS}"
    return {launch.item: why for launch in launches if launch.item not in tried}


def _parts(problem: Problem) -> int:
    return min(_MOST_PARTS, -(-problem.k // problem.n))


def _columns(problem: Problem) -> int:
    """How many columns of the activation are seen: whole blocks."""
    block = FORMATS[problem.format].block
    return min(problem.k, _parts(problem) * problem.n) // block * block


def _ones(problem: Problem, part: int, device: torch.device) -> Fp4Tensor:
    """A weight whose row r is 1 at column ``part * n + r`` and 0 elsewhere."""
    fmt = FORMATS[problem.format]
    n, k = problem.n, problem.k
    codes = torch.zeros(n, k // 2, dtype=torch.uint8, device=device)
    row = torch.arange(min(n, max(0, k - part * n)), device=device)
    column = part * n + row
    codes[row, column // 2] = (2 << (4 * (column & 1))).to(torch.uint8)
    scales = torch.full((n, k // fmt.block), _ONE[fmt.scale], dtype=torch.uint8, device=device)
    return Fp4Tensor(fmt, codes, scales, torch.ones((), dtype=torch.float32, device=device))


def _activation_and_scale(
    problem: Problem, launch: Launch, kind: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """An activation (m, k) in the problem's dtype, and its global scale: a power of two, so that
    the output holds every dequantised element exactly."""
    key = stream_key(launch.offset, f"own quantiser/{kind}/{launch.m}/{launch.case}")
    size = 2.0 ** (launch.m % 7 - 3)
    x = (ACTIVATIONS[kind](launch.m, problem.k, key, device) * size).to(problem.dtype)
    if not FORMATS[problem.format].has_global:
        return x, torch.ones((), dtype=torch.float32, device=device)
    largest = max(float(x.float().abs().max()), 2.0**-20)
    exponent = math.ceil(math.log2(largest / GSF_NUMERATOR))
    return x, torch.tensor(2.0**exponent, dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A prepared weight of ones, and how many columns it shows."""

    state: Any
    n: int


def _seen(
    backend: Backend, shown: _Shown, x: torch.Tensor, scale: torch.Tensor, tactic: str
) -> torch.Tensor:
    """What the GEMM makes of the activation, in an output (m, n) that was poison before."""
    out = poison(torch.empty(x.shape[0], shown.n, dtype=x.dtype, device=x.device))
    quantise_and_run(backend, shown.state, x, scale, out, tactic)
    wait(out.device)
    return out


def judge(x: torch.Tensor, read: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """bool (m, k/block): blocks that no scale near ours explains.

    x (m, k) as it was, read (m, k) as it was dequantised, scale the global one, float32 ().
    """
    m, k = x.shape
    ours = quantise(x, fmt, scale if fmt.has_global else None)
    blocks = x.double().view(m, k // fmt.block, fmt.block)
    found = read.double().view_as(blocks)
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], dtype=torch.float64, device=x.device)
    fits = torch.zeros(blocks.shape[:2], dtype=torch.bool, device=x.device)
    highest = 0x7E if fmt.scale == "e4m3" else 0xFE
    for step in (-1, 0, 1):
        raw = (ours.scales.int() + step).clamp(0, highest).to(torch.uint8)
        width = (decode_scale(raw, fmt, torch.float64) * scale.double()).unsqueeze(-1)
        ratio = torch.where(width > 0, blocks / width, torch.zeros_like(blocks))
        best = (blocks - table[encode_e2m1(ratio).long()] * width).abs()
        error = (blocks - found).abs()
        held = torch.where(width > 0, found / width, found)
        of_the_format = (held.unsqueeze(-1) == table).any(dim=-1)
        fits |= ((error <= best + _TIE * blocks.abs()) & of_the_format).all(dim=-1)
    return ~fits
