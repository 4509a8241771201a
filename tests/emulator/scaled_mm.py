"""``torch.nn.functional.scaled_mm`` for FP4, from its documentation and argument checks (2.10)."""

from __future__ import annotations

from typing import Any

import torch

from . import numbers, places

TENSOR, BLOCK16, BLOCK32 = 0, 2, 3  # torch.nn.functional.ScalingType
NO_SWIZZLE, SWIZZLE_32_4_4 = 0, 1  # torch.nn.functional.SwizzleType


def scaled_mm_out(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    scale_a: list[torch.Tensor],
    recipe_a: list[int],
    swizzle_a: list[int],
    scale_b: list[torch.Tensor],
    recipe_b: list[int],
    swizzle_b: list[int],
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """``aten::_scaled_mm_v2.out`` with FP4 operands: mat_a row-major (m, k/2), mat_b
    column-major (k/2, n), both ``float4_e2m1fn_x2``."""
    fp4 = torch.float4_e2m1fn_x2
    if mat_a.dtype != fp4 or mat_b.dtype != fp4:
        raise ValueError("mat_a and mat_b must be float4_e2m1fn_x2")
    if not mat_a.is_contiguous() or mat_b.stride() != (1, mat_b.shape[0]):
        raise ValueError("mat_a must be row-major and mat_b column-major")
    if mat_a.shape[1] % 16 or mat_b.shape[1] % 16:
        raise ValueError("trailing dimensions must be multiples of 16")
    fmt = _format(recipe_a, swizzle_a, scale_a)
    if fmt != _format(recipe_b, swizzle_b, scale_b) or bias is not None:
        raise ValueError("both operands take one recipe")
    if out.dtype != out_dtype:
        raise ValueError("out is not of out_dtype")
    (m, packed), n = mat_a.shape, mat_b.shape[1]
    cols = 2 * packed // numbers.BLOCK[fmt]
    sides = []
    for side, count, scales in ((mat_a, m, scale_a[0]), (mat_b, n, scale_b[0])):
        codes = places.memory(side.view(torch.uint8)).reshape(count, packed)
        linear = places.tiled(places.memory(scales), count, cols, 128)
        sides.append(numbers.scaled(numbers.unpack(codes), linear, fmt))
    alpha = 1.0
    if fmt == "nvfp4":
        alpha = float(scale_a[1] * scale_b[1])
    out.resize_(m, n)
    places.write(out, alpha * (sides[0] @ sides[1].T))
    return out


def _format(recipe: list[int], swizzle: list[int], scales: list[torch.Tensor]) -> str:
    dtypes: list[Any] = [scale.dtype for scale in scales]
    if not all(scale.is_contiguous() for scale in scales):
        raise ValueError("scales must be contiguous")
    two_levels = dtypes == [torch.float8_e4m3fn, torch.float32] and scales[1].numel() == 1
    if recipe == [BLOCK16, TENSOR] and swizzle == [SWIZZLE_32_4_4, NO_SWIZZLE] and two_levels:
        return "nvfp4"
    if recipe == [BLOCK32] and swizzle == [SWIZZLE_32_4_4] and dtypes == [torch.float8_e8m0fnu]:
        return "mxfp4"
    raise ValueError(f"no implementation for {recipe}, {swizzle}, {dtypes}")
