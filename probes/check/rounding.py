"""Rounding float64 to 16-bit floats in a stated direction.

torch converts float64 to a 16-bit type by way of float32, which rounds twice. Here the result of
that conversion, always one of the two neighbours, is moved to the right one by comparing in
float64.
"""

from __future__ import annotations

import torch

SMALLEST_SUBNORMAL = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of rounding to nearest."""
OVERFLOW = {torch.bfloat16: (2 - 2.0**-8) * 2.0**127, torch.float16: 65520.0}
"""Magnitudes from here on round to infinity."""


def _move_by_one(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Each 16-bit float moved to the next one up or down where asked."""
    bits = x.view(torch.int16).to(torch.int32)
    # Sign and magnitude to a monotone integer: both zeros become 0, neighbours differ by 1.
    place = torch.where(bits < 0, -(bits & 0x7FFF), bits)
    place += up.to(torch.int32)
    place -= down.to(torch.int32)
    bits = torch.where(place < 0, -place - 0x8000, place)
    return bits.to(torch.int16).view(x.dtype)


def round_down(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest value of `dtype` (bfloat16 or float16) that is <= x (float64)."""
    near = x.float().to(dtype)
    wrong = near.double() > x
    return _move_by_one(near, torch.zeros_like(wrong), wrong)


def round_up(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest value of `dtype` (bfloat16 or float16) that is >= x (float64)."""
    near = x.float().to(dtype)
    wrong = near.double() < x
    return _move_by_one(near, wrong, torch.zeros_like(wrong))


def round_nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (float64) correctly rounded to `dtype`, ties to even; overflow goes to infinity."""
    low, high = round_down(x, dtype), round_up(x, dtype)
    to_low, to_high = x - low.double(), high.double() - x
    even = (low.view(torch.int16) & 1) == 0
    found = torch.where((to_low < to_high) | ((to_low == to_high) & even), low, high)
    limit = OVERFLOW[dtype]
    infinity = torch.full_like(found, float("inf"))
    found = torch.where(x >= limit, infinity, found)
    return torch.where(x <= -limit, -infinity, found)
