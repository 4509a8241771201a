"""``torch-scaled-mm`` (W4A4): torch's scaled matmul on ``float4_e2m1fn_x2``, cuBLASLt below.

Written from PyTorch's documentation and argument checks (2.10 to 2.13), not run on hardware yet.
NVFP4 has two levels of scales and MXFP4 one; both are in the 32x4x4 swizzle, which is 128x4. In
NVFP4 torch multiplies the two global scales on the device in every call, a small kernel in front
of the GEMM that engines pay for too. On NVIDIA, MXFP4 is a CUTLASS kernel for SM100 and SM103
that torch contains only where it was built with MSLK; where it was not, the call says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...problem import Device, Fp4Tensor, Problem
from .._block_scaled import Swizzled
from .dequant import not_dense

_TENSOR_WISE, _BLOCK_1X16, _BLOCK_1X32 = 0, 2, 3  # torch.nn.functional.ScalingType
_NO_SWIZZLE, _SWIZZLE_32_4_4 = 0, 1  # torch.nn.functional.SwizzleType

FIRST_SM = 100
"""cuBLASLt multiplies FP4 from compute capability 10.0 on."""
MXFP4_SMS = (100, 103)


def operator() -> Callable[..., Any] | None:
    """torch's scaled matmul into a given output; None where this torch has none for FP4."""
    packet = getattr(torch.ops.aten, "_scaled_mm_v2", None)
    if packet is None or not hasattr(torch, "float4_e2m1fn_x2"):
        return None
    return getattr(packet, "out", None)


class TorchScaledMm:
    """`run` takes what `prepare_activation` returns."""

    name = "torch-scaled-mm"
    activation = "fp4"
    layout = "swizzled"
    distributions = ("nvidia-cublas-cu12", "nvidia-cublas")
    reference_line = False

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        if reason := not_dense(self, problem):
            return reason
        if device.sm < FIRST_SM:
            return f"cuBLASLt multiplies FP4 from SM {FIRST_SM} on, not on SM {device.sm}"
        if operator() is None:
            return f"torch {torch.__version__} has no scaled matmul for FP4 (2.10 or newer has)"
        if problem.format == "mxfp4":
            if device.sm not in MXFP4_SMS:
                return f"torch multiplies mxfp4 on SM 100 and 103, not on SM {device.sm}"
            if problem.out_dtype != "bf16":
                return f"torch writes bf16 only for mxfp4, not {problem.out_dtype}"
        for letter, value, step in (("n", problem.n, 16), ("k", problem.k, 32)):
            if value % step:
                return f"{self.name} needs {letter} to be a multiple of {step}, and it is {value}"
        return None

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Swizzled:
        return Swizzled.of(weight)

    def prepare_activation(self, a: Fp4Tensor) -> Swizzled:
        return Swizzled.of(a)

    def run(self, state: Swizzled, a: Any, out: torch.Tensor, tactic: str) -> None:
        if a.codes.shape[0] == 0:
            return
        multiply = operator()
        if multiply is None:
            raise RuntimeError("this torch has no scaled matmul for FP4")
        recipe, swizzle = _recipe(a)
        multiply(
            a.codes.view(torch.float4_e2m1fn_x2),
            state.codes.view(torch.float4_e2m1fn_x2).t(),
            _scales(a),
            recipe,
            swizzle,
            _scales(state),
            recipe,
            swizzle,
            None,
            out.dtype,
            out=out,
        )


def _recipe(side: Swizzled) -> tuple[list[int], list[int]]:
    """The kinds of scales an operand has, the inner one first, and how each is swizzled."""
    if side.format.has_global:
        return [_BLOCK_1X16, _TENSOR_WISE], [_SWIZZLE_32_4_4, _NO_SWIZZLE]
    return [_BLOCK_1X32], [_SWIZZLE_32_4_4]


def _scales(side: Swizzled) -> list[torch.Tensor]:
    if side.format.has_global:
        return [side.scales.view(torch.float8_e4m3fn), side.global_scale.reshape(1)]
    return [side.scales.view(torch.float8_e8m0fnu)]
