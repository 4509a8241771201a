"""One product an output: operands whose every bit must arrive, whatever the accumulator.

With one non-zero activation in each row there is nothing to sum up, so a short accumulator changes
nothing, and neither does the order. Products fit in the output's significand. What differs from
them has lost bits of an operand on its way to the product.
"""

from __future__ import annotations

import torch

from ..problem import FORMATS, Fp4Tensor, Problem
from .blocks import random_fp4
from .generator import Drawn, below, hash_elements, hash_rows, mix, stream_key
from .operands import Operands

BITS = 8
"""Significant bits of an activation that must arrive: all of bf16's, and 8 of fp16's 11."""
_WIDTH = 8
_ONE = {"e4m3": 7, "e8m0": 127}
"""The exponent field of a scale of 1."""
_UNITS = (6, 4, 2, 1)
"""Codes of 4, 2, 1 and a half: what makes a one of scales of a quarter, a half, 1 and 2."""


def activation_bits(problem: Problem, seed: int, device: torch.device | str) -> Operands:
    """Activations of 8 significant bits, one in each row, on a weight of ones and minus ones made
    of four block scales. FP4 activations have all that their codes and scales hold."""
    weight = _ones_by_scales(problem, seed, device)
    key = stream_key(seed, "activation bits")
    if problem.activation == "fp4":
        return _operands_of_width(
            "activation-bits", seed, _one_code_a_row(problem, key, device), weight
        )
    bits = hash_rows(problem.m, key, device)
    # Odd numbers from 129 to 255: all eight bits are needed.
    size = 129 + 2 * below(bits, 0, 12, 64)
    value = torch.where((bits & 1 << 20) != 0, -size, size).float()
    return _operands_of_width(
        "activation-bits", seed, _one_a_row(problem, value, key, device), weight
    )


def weight_bits(problem: Problem, seed: int, device: torch.device | str) -> Operands:
    """Powers of two as activations, one in each row, on a weight of all codes and mantissas."""
    fmt = FORMATS[problem.format]

    def scale(bits: torch.Tensor, by_group: torch.Tensor) -> torch.Tensor:
        exponent = _ONE[fmt.scale] - 2 + below(bits, 0, 12, 4)
        if fmt.scale == "e8m0":
            return exponent
        return (exponent << 3) | below(bits, 12, 12, 8)

    drawn = Drawn(problem.n, problem.k, stream_key(seed, "weight bits"), device)
    weight = random_fp4(drawn, fmt, scale)
    key = stream_key(seed, "powers")
    if problem.activation == "fp4":
        a = _one_code_a_row(problem, key, device, plain=True)
        return _operands_of_width("weight-bits", seed, a, weight)
    bits = hash_rows(problem.m, key, device)
    value = torch.exp2((below(bits, 0, 12, 7) - 3).float())
    value = torch.where((bits & 1 << 20) != 0, -value, value)
    return _operands_of_width("weight-bits", seed, _one_a_row(problem, value, key, device), weight)


def _operands_of_width(
    name: str, seed: int, a: torch.Tensor | Fp4Tensor, weight: Fp4Tensor
) -> Operands:
    return Operands(a, weight, family=name, width=_WIDTH, seed=seed)


def _one_column_a_row(problem: Problem, key: int, device: torch.device | str) -> torch.Tensor:
    """Where each row has its one element."""
    return (hash_rows(problem.m, mix(key + 1), device) & 0x7FFFFFFF) % problem.k


def _one_a_row(
    problem: Problem, value: torch.Tensor, key: int, device: torch.device | str
) -> torch.Tensor:
    a = torch.zeros(problem.m, problem.k, dtype=problem.dtype, device=device)
    row = torch.arange(problem.m, device=device)
    a[row, _one_column_a_row(problem, key, device)] = value.to(problem.dtype)
    return a


def _one_code_a_row(
    problem: Problem, key: int, device: torch.device | str, plain: bool = False
) -> Fp4Tensor:
    """An FP4 activation of one non-zero code in each row; `plain`: powers of two only."""
    fmt = FORMATS[problem.format]
    m, k = problem.m, problem.k
    bits = hash_rows(m, key, device)
    column = _one_column_a_row(problem, key, device)
    row = torch.arange(m, device=device)
    code = 2 if plain else 1 + below(bits, 0, 12, 7)
    signed = code | ((bits >> 20 & 1) << 3)
    codes = torch.zeros(m, k // 2, dtype=torch.uint8, device=device)
    codes[row, column // 2] = (signed << (4 * (column & 1))).to(torch.uint8)
    one = _ONE[fmt.scale]
    exponent = one - 1 + below(hash_elements(m, k // fmt.block, mix(key + 2), device), 0, 12, 3)
    if fmt.scale == "e8m0":
        scales = exponent
    else:
        mantissa = 0 if plain else below(hash_elements(m, k // 16, mix(key + 3), device), 0, 12, 8)
        scales = (exponent << 3) | mantissa
    return Fp4Tensor(
        fmt, codes, scales.to(torch.uint8), torch.ones((), dtype=torch.float32, device=device)
    )


def _ones_by_scales(problem: Problem, seed: int, device: torch.device | str) -> Fp4Tensor:
    """A weight whose every value is 1 or -1, by four block scales and the code that undoes each."""
    fmt = FORMATS[problem.format]
    key = stream_key(seed, "ones")
    which = below(hash_elements(problem.n, problem.k // fmt.block, key, device), 0, 12, 4)
    exponent = _ONE[fmt.scale] - 2 + which
    raw = (exponent if fmt.scale == "e8m0" else exponent << 3).to(torch.uint8)
    unit = torch.tensor(_UNITS, dtype=torch.int32, device=device)[which.long()]
    pairs = unit.repeat_interleave(fmt.block // 2, dim=1)
    signs = hash_elements(problem.n, problem.k // 2, mix(key + 1), device) & 0x88
    codes = (pairs | pairs << 4 | signs).to(torch.uint8)
    return Fp4Tensor(fmt, codes, raw, torch.ones((), dtype=torch.float32, device=device))
