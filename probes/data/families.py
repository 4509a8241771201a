"""Realistic and extreme operands: what exact problems, by being exact, cannot show.

Each family is one kind of data. One that breaks a `Condition` is judged apart: a backend that fails
only there is safe for weights that meet the condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...words import Condition
from ..formats import quantise
from ..problem import FORMATS, Fp4Tensor, Problem
from .bits import activation_bits, weight_bits
from .blocks import normal_matrix, random_fp4, uniform_bytes
from .generator import Drawn, below, hash_elements, hash_rows, stream_key
from .operands import Operands

Device = torch.device | str
_WEIGHT_STD = 0.02
_ZERO_ROW = (8, 5)
"""Rows 5, 13, 21, ... of a zero-blocks activation are zero; row 0 never, for m = 1."""
_FP16_TOP = 2.0**14


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of operands. `draw` takes (problem, seed, device)."""

    name: str
    draw: Callable[[Problem, int, Device], Operands]
    condition: Condition | None
    doc: str
    formats: tuple[str, ...] = ("nvfp4", "mxfp4")
    """The formats in which this data exists."""
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    """The output dtypes in which it exists."""
    bounded_by: str | None = None
    """The family just inside `condition`: only where that passes is the condition known to hold."""


def _in_format(x: torch.Tensor, problem: Problem) -> torch.Tensor | Fp4Tensor:
    if problem.activation == "fp4":
        return quantise(x, FORMATS[problem.format])
    return x.to(problem.dtype)


def _normal_pair(problem: Problem, seed: int, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal float32 activation (m, k), deviation 1, and weight (n, k), deviation 0.02."""
    a = normal_matrix(problem.m, problem.k, stream_key(seed, "a"), device)
    weight = normal_matrix(problem.n, problem.k, stream_key(seed, "weight"), device).mul_(
        _WEIGHT_STD
    )
    return a, weight


def _operands_of_any_width(
    name: str, seed: int, a: torch.Tensor | Fp4Tensor, weight: Fp4Tensor
) -> Operands:
    return Operands(a, weight, family=name, width=None, seed=seed)


def _realistic(problem: Problem, seed: int, device: Device) -> Operands:
    a, weight = _normal_pair(problem, seed, device)
    return _operands_of_any_width(
        "realistic", seed, _in_format(a, problem), quantise(weight, FORMATS[problem.format])
    )


def _outlier_operands(problem: Problem, seed: int, device: Device) -> Operands:
    a, weight = _normal_pair(problem, seed, device)
    channel = hash_rows(problem.k, stream_key(seed, "channels"), device)
    a *= torch.where((channel & 63) == 0, 47.0, 1.0)
    row = hash_rows(problem.n, stream_key(seed, "rows"), device).unsqueeze(1)
    weight *= torch.where((row & 31) == 0, 11.0, 1.0)
    return _operands_of_any_width(
        "outliers", seed, _in_format(a, problem), quantise(weight, FORMATS[problem.format])
    )


def _zero_block_pair(problem: Problem, seed: int, device: Device) -> Operands:
    fmt = FORMATS[problem.format]
    a, weight = _normal_pair(problem, seed, device)

    def thin(x: torch.Tensor, key: int, whole: torch.Tensor) -> torch.Tensor:
        keep = (hash_elements(x.shape[0], problem.k // fmt.block, key, device) & 3) != 0
        keep &= ~whole.unsqueeze(1)
        # Times 0.0, not set to 0: negative elements become -0.
        return x.mul_(keep.repeat_interleave(fmt.block, dim=1))

    every, at = _ZERO_ROW
    index = torch.arange(problem.m, device=device)
    a = thin(a, stream_key(seed, "zero a"), index % every == at)
    rows = hash_rows(problem.n, stream_key(seed, "zero rows"), device)
    weight = thin(weight, stream_key(seed, "zero weight"), (rows & 7) == 0)
    return _operands_of_any_width(
        "zero-blocks", seed, _in_format(a, problem), quantise(weight, fmt)
    )


def _activation_range(problem: Problem, seed: int, device: Device) -> Operands:
    """Each activation row has a magnitude of its own, a power of two from 2^-20 to 2^15."""
    a, weight = _normal_pair(problem, seed, device)
    low, high = (-12, 10) if problem.out_dtype == "fp16" else (-20, 15)
    bits = hash_rows(problem.m, stream_key(seed, "magnitudes"), device)
    anywhere = below(bits, 0, 16, high - low + 1)
    near = below(bits, 0, 16, 3)
    third = torch.arange(problem.m, device=device) % 3
    # The smallest, the largest, and any, by turns: even one row is far from 1.
    power = (
        torch.where(third == 0, near, torch.where(third == 1, high - low - near, anywhere)) + low
    )
    a *= torch.exp2(power.float()).unsqueeze(1)
    return _operands_of_any_width(
        "activation-range", seed, _in_format(a, problem), quantise(weight, FORMATS[problem.format])
    )


def _odd_rows(problem: Problem, seed: int, device: Device) -> Operands:
    """Rows 500 times as large as their neighbours, rows with one element of 2^14 (2^10 for fp16),
    rows equal to the one before, and -0 for one element in four."""
    a, weight = _normal_pair(problem, seed, device)
    kind = hash_rows(problem.m, stream_key(seed, "kinds"), device) & 7
    a *= torch.where(kind == 1, 500.0, 1.0).unsqueeze(1)
    minus = (hash_elements(problem.m, problem.k, stream_key(seed, "zeros"), device) & 3) == 0
    a = torch.where(minus, -0.0, a)
    spike = 2.0**10 if problem.out_dtype == "fp16" else 2.0**14
    column = (hash_rows(problem.m, stream_key(seed, "columns"), device) & 0xFFFF) % problem.k
    row = torch.arange(problem.m, device=device)
    huge = (kind == 2) | (row == problem.m // 2)
    a[row, column] = torch.where(huge, spike, a[row, column])
    equal = (kind == 3) & (row > 0)
    a = torch.where(equal.unsqueeze(1), a.roll(1, 0), a)
    return _operands_of_any_width(
        "odd-rows", seed, _in_format(a, problem), quantise(weight, FORMATS[problem.format])
    )


def _max_scales(problem: Problem, seed: int, device: Device) -> Operands:
    fmt = FORMATS[problem.format]
    largest = uniform_bytes(0x7D, 0x7E)
    w4a4 = problem.activation == "fp4"
    scale = 1.0
    if problem.out_dtype == "fp16":  # no sum can exceed this bound on k * |a| * |b|
        scale = _FP16_TOP / (problem.k * 2688.0 * (2688.0 if w4a4 else 4.9))
    share = scale**0.5 if w4a4 else scale
    drawn = Drawn(problem.n, problem.k, stream_key(seed, "weight"), device)
    weight = random_fp4(drawn, fmt, largest, share)
    if w4a4:
        drawn = Drawn(problem.m, problem.k, stream_key(seed, "a"), device)
        a = random_fp4(drawn, fmt, largest, share)
        return _operands_of_any_width("max-scales", seed, a, weight)
    a16 = normal_matrix(problem.m, problem.k, stream_key(seed, "a"), device)
    return _operands_of_any_width("max-scales", seed, _in_format(a16, problem), weight)


def _overflow(problem: Problem, seed: int, device: Device) -> Operands:
    """Outputs with a deviation near 65504: about a third of them are infinite in fp16."""
    a, weight = _normal_pair(problem, seed, device)
    weight *= 2.0 ** round(math.log2(2.0**16 / (_WEIGHT_STD * problem.k**0.5)))
    quantised = quantise(weight, FORMATS[problem.format])
    return _operands_of_any_width("overflow", seed, _in_format(a, problem), quantised)


def _with_weight_scales(
    name: str,
    scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    problem: Problem,
    seed: int,
    device: Device,
    global_scale: float = 1.0,
) -> Operands:
    """A normal activation and a weight of random codes with the given block scales."""
    a = normal_matrix(problem.m, problem.k, stream_key(seed, "a"), device)
    drawn = Drawn(problem.n, problem.k, stream_key(seed, "weight"), device)
    weight = random_fp4(drawn, FORMATS[problem.format], scale, global_scale)
    return _operands_of_any_width(name, seed, _in_format(a, problem), weight)


def _min_normal_scales(problem: Problem, seed: int, device: Device) -> Operands:
    """Raw scales 0x08 (exactly 2**-6) to 0x0F."""
    scale = uniform_bytes(0x08, 0x0F)
    return _with_weight_scales("min-normal-scales", scale, problem, seed, device)


def _subnormal_scales(problem: Problem, seed: int, device: Device) -> Operands:
    """Three blocks in four have a scale of 1 to 7 times 2**-9, the others 2**-6 and above."""

    def scale(bits: torch.Tensor, by_group: torch.Tensor) -> torch.Tensor:
        small, ordinary = 1 + below(bits, 0, 14, 7), 8 + below(bits, 0, 14, 16)
        return torch.where(((bits >> 16) & 3) != 0, small, ordinary)

    return _with_weight_scales("subnormal-scales", scale, problem, seed, device)


def _fraction(seed: int, stream: str) -> float:
    """A float32 in [1.25, 1.5) with all its significand bits in use (the last one is set)."""
    bits = 0x200000 | (stream_key(seed, stream) & 0x1FFFFF) | 1
    return 1.0 + bits / 2.0**23


def _alpha_small(problem: Problem, seed: int, device: Device) -> Operands:
    a, weight = _normal_pair(problem, seed, device)
    exponent = -24 if problem.out_dtype == "fp16" else -40
    quantised = quantise(weight, FORMATS[problem.format])
    tiny = torch.tensor(_fraction(seed, "alpha") * 2.0**exponent, device=device)
    return _operands_of_any_width(
        "alpha-small", seed, _in_format(a, problem), replace(quantised, global_scale=tiny)
    )


def _alpha_large(problem: Problem, seed: int, device: Device) -> Operands:
    """Block scales from 2**-6 to 2**-3 under a global scale of 160 to 192, both sides in W4A4."""
    scale = uniform_bytes(0x08, 0x20)
    large = _fraction(seed, "alpha") * 2.0**7
    found = _with_weight_scales("alpha-large", scale, problem, seed, device, large)
    if problem.activation == "bf16":
        return found
    drawn = Drawn(problem.m, problem.k, stream_key(seed, "a"), device)
    own = _fraction(seed, "alpha a")
    return replace(found, a=random_fp4(drawn, FORMATS[problem.format], scale, own))


def _wide_scales(problem: Problem, seed: int, device: Device) -> Operands:
    low, high = (-10, 4) if problem.out_dtype == "fp16" else (-24, 8)
    scale = uniform_bytes(127 + low, 127 + high)
    return _with_weight_scales("wide-scales", scale, problem, seed, device)


def _extreme_scales(problem: Problem, seed: int, device: Device) -> Operands:
    """Each 128 rows of the weight have a range of 9 binades, anywhere in the format's reach.

    128, so that a tile of the output has one magnitude and its norm says something of all of it.
    """
    low, high = (-18, 4) if problem.out_dtype == "fp16" else (-100, 100)

    def scale(bits: torch.Tensor, by_group: torch.Tensor) -> torch.Tensor:
        base = low + below(by_group, 0, 16, high - low + 1)
        return 127 + base - below(bits, 0, 16, 9)

    return _with_weight_scales("extreme-scales", scale, problem, seed, device)


_BLOCK_SCALE_MIN = Condition("block-scale-min", "smallest non-zero block scale >= 2^-6")
_BLOCK_SCALE_RANGE = Condition(
    "block-scale-range",
    "block scales of non-zero blocks between 2^-24 and 2^8 (2^-10 and 2^4 for fp16)",
)
_FP16_RANGE = Condition("fp16-range", "no output passes 65504, the largest number in fp16")
_NVFP4, _MXFP4 = ("nvfp4",), ("mxfp4",)

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family(
            "realistic",
            _realistic,
            None,
            "normal weights (deviation 0.02) and activations (deviation 1), quantised by us",
        ),
        Family(
            "outliers",
            _outlier_operands,
            None,
            "activation channels 47 times, weight rows 11 times as large as the rest",
        ),
        Family(
            "zero-blocks",
            _zero_block_pair,
            None,
            "a quarter of the blocks and an eighth of the rows are zero, with -0 among them",
        ),
        Family(
            "activation-bits",
            activation_bits,
            None,
            "one activation of 8 significant bits in each row, on a weight of ones: exact",
        ),
        Family(
            "weight-bits",
            weight_bits,
            None,
            "one power of two in each row, on a weight of all codes and mantissas: exact",
        ),
        Family(
            "activation-range",
            _activation_range,
            None,
            "activation rows with magnitudes from 2^-20 to 2^15 (2^-12 to 2^10 for fp16)",
        ),
        Family(
            "odd-rows",
            _odd_rows,
            None,
            "activation rows 500 times their neighbours, with one huge element, equal, and -0",
        ),
        Family(
            "max-scales",
            _max_scales,
            None,
            "e4m3 block scales of 416 and 448; fp16 outputs scaled to stay finite",
            _NVFP4,
        ),
        Family(
            "min-normal-scales",
            _min_normal_scales,
            None,
            "weight block scales in [2^-6, 2^-5), the smallest exactly 2^-6",
            _NVFP4,
        ),
        Family(
            "subnormal-scales",
            _subnormal_scales,
            _BLOCK_SCALE_MIN,
            "weight block scales below 2^-6, down to 2^-9, which e4m3 holds as subnormals",
            _NVFP4,
            bounded_by="min-normal-scales",
        ),
        Family(
            "overflow",
            _overflow,
            _FP16_RANGE,
            "fp16 outputs around the largest number: a third of them rightly infinite",
            dtypes=("fp16",),
            bounded_by="realistic",
        ),
        Family(
            "alpha-small",
            _alpha_small,
            None,
            "a weight global scale near 2^-40 (2^-24 for fp16) with 24 significand bits",
            _NVFP4,
        ),
        Family(
            "alpha-large",
            _alpha_large,
            None,
            "a weight global scale of 160 to 192 with 24 significand bits over small block scales",
            _NVFP4,
        ),
        Family(
            "wide-scales",
            _wide_scales,
            None,
            "e8m0 weight block scales anywhere from 2^-24 to 2^8 (2^-10 to 2^4 for fp16)",
            _MXFP4,
        ),
        Family(
            "extreme-scales",
            _extreme_scales,
            _BLOCK_SCALE_RANGE,
            "every 128 weight rows have e8m0 block scales around something from 2^-100 to 2^100",
            _MXFP4,
            bounded_by="wide-scales",
        ),
    )
}


def families(problem: Problem) -> tuple[Family, ...]:
    """The families that exist for a problem's format and dtype, those without a condition first."""
    found = [
        f
        for f in FAMILIES.values()
        if problem.format in f.formats and problem.out_dtype in f.dtypes
    ]
    return tuple(sorted(found, key=lambda f: f.condition is not None))


def draw(problem: Problem, family: str, seed: int, device: Device) -> Operands:
    """Operands of a family, the same bits on every device.

    Raises ValueError for a family that is not known or does not exist in the problem's format or
    dtype, and for groups.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    found = FAMILIES[family]
    if problem.format not in found.formats:
        raise ValueError(f"family {family} does not exist in {problem.format}")
    if problem.out_dtype not in found.dtypes:
        raise ValueError(f"family {family} does not exist with {problem.out_dtype} outputs")
    if problem.groups != 1:
        raise ValueError("families are drawn for one group")
    return found.draw(problem, seed, device)
