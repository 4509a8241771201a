"""``marlin``: SGLang's W4A16 NVFP4 linear layer on its JIT Marlin kernels.

This stands in for what SGLang 0.5.23 runs for ``--fp4-gemm-backend marlin`` (its default on SM80 to
SM90), so it prepares weights as SGLang does and mends nothing:

* n and k are padded with zeros to a multiple of (64, 128) or (128, 64), whichever is smaller;
  activations are padded and the output cut back on every call where that changed anything.
* Block scales become eight bits without a sign (five of exponent, three of mantissa) after a
  multiplication by 2^7; sign and NaN are lost. The bf16 kernel moves the highest exponent bit to
  bf16's own highest, so that a scale below 2^-6, which has it clear, counts 2^112 times less.
* The global scale is rounded to the 16-bit dtype and multiplied by 2^119 (bf16) or 2^7 (fp16).
* Each layer has one lock workspace of one int32 per SM, shared by all streams that call it.
* The fp32 reduction buffer is allocated on every call. Partial sums of n < 2048, k >= 2048 (after
  padding) are reduced by atomic additions, in an order that varies; not for bf16 below SM90.

Differences from SGLang, none on the GPU: the empty tensors for features FP4 lacks are made once,
the SM count is read once, and the output is written where the caller wants it.

Which kernel runs for which m is decided inside the entry point and cannot be pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...problem import Device, Fp4Tensor, Problem
from .. import _call_sources
from . import _build

E2M1_TYPE_ID = 562949953487106
"""SGLang's packed description of float4_e2m1: 2 exponent bits, 1 mantissa bit, signed, no NaN."""

BLOCK = 16
TILE = 16
MAX_THREAD_N = 256
MAX_BLOCK_M = 64


def padded_shape(n: int, k: int) -> tuple[int, int]:
    """The (n, k) Marlin computes for a weight of this shape: the smaller of its two paddings."""

    def up(x: int, multiple: int) -> int:
        return -(-x // multiple) * multiple

    choices = ((up(n, 64), up(k, 128)), (up(n, 128), up(k, 64)))
    return min(choices, key=lambda nk: (nk[0] * nk[1], nk[0] + nk[1]))


def uses_atomic_add(n: int, k: int, dtype: torch.dtype, sm: int) -> bool:
    """Whether SGLang asks for partial sums to be added atomically; n and k are padded."""
    return n < 2048 and k >= 2048 and not (sm < 90 and dtype == torch.bfloat16)


def to_s0e5m3(scales: torch.Tensor) -> torch.Tensor:
    """Block scales (any shape, 16-bit floats) as uint8: the fp16 bits of 2^7 * scale, cut.

    A byte b means ``(1 + (b & 7) / 8) * 2^((b >> 3) - 15 - 7)``; 0 means 0. Exact for every finite
    e4m3 value but -0 and the negative ones, which lose their sign.
    """
    bits = (scales.half() * 2.0**7).view(torch.int16)
    return ((bits >> 7) & 0xFF).to(torch.uint8)


def permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """(k/16, n) in the order the kernel's threads read it: 8x8 transposed, then pairs swapped."""
    groups, n = scales.shape
    tiles = scales.reshape(-1, 8, 8).transpose(1, 2)
    quads = tiles.reshape(-1, 2, 2).transpose(1, 2)
    return quads.reshape(groups, n).contiguous()


def prepare_scales(raw: torch.Tensor, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """e4m3 bytes (rows, blocks) to the kernel's (k/16, n) scales, for padded n and k."""
    padding = (0, k // BLOCK - raw.shape[1], 0, n - raw.shape[0])
    scales = torch.nn.functional.pad(raw, padding).view(torch.float8_e4m3fn)
    transposed = scales.to(dtype).T.contiguous()
    return to_s0e5m3(permute_scales(transposed)).view(torch.float8_e4m3fn)


def prepare_global_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 scalars, one or many, in the 16-bit dtype, times what the exponents leave open.

    The kernel moves an e2m1 code's exponent bits (bias 1) into the dtype's exponent field without
    correcting the bias, which is 127 in bf16 and 15 in fp16; the block scales already carry 2^7.
    """
    bias = 126 if dtype == torch.bfloat16 else 14
    return (scale.to(dtype) * 2.0 ** (bias - 7)).reshape(-1)


@dataclass(frozen=True, slots=True)
class MarlinWeight:
    """A weight in Marlin's layout, with all a call needs besides activations.

    weight        int32 (k/16, 2n), both padded
    scales        S0E5M3 bytes, held as float8_e4m3fn (k/16, n)
    global_scale  (1,) in the activation's dtype
    workspace     int32 (SMs,), the layer's locks
    """

    gemm: Callable[..., Any]
    weight: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    workspace: torch.Tensor
    no_int: torch.Tensor
    no_float: torch.Tensor
    n: int
    k: int
    padded_n: int
    padded_k: int
    atomic: bool


class Marlin:
    """SGLang's Marlin for NVFP4 weights and 16-bit activations."""

    name = "marlin"
    activation = "bf16"
    layout = "marlin"
    distributions = ("sglang", "apache-tvm-ffi")
    reference_line = False

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return "marlin runs on CUDA GPUs only"
        if device.sm < 80:
            return f"marlin needs SM80 or newer, and this is SM{device.sm}"
        if problem.activation != "bf16":
            return "marlin takes 16-bit activations, not fp4"
        if problem.format != "nvfp4":
            return f"marlin's linear layer takes nvfp4 weights, not {problem.format}"
        if problem.groups != 1:
            return f"marlin computes dense problems here, and this has {problem.groups} groups"
        return _build.missing()

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Compile and load the GEMM of each output dtype and the repacking kernel.

        Raises RuntimeError, with the compiler's message, if that fails.
        """
        assert device.sm is not None
        dtypes = sorted({problem.out_dtype for problem in problems})
        _build.build([*(f"gemm_{d}" for d in dtypes), "repack"], device.sm, workers)

    def call_source(self) -> str:
        """See `backends.Backend`."""
        return _call_sources.MARLIN

    def files(self) -> Sequence[Path]:
        return _build.loaded_files()

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> MarlinWeight:
        device = weight.codes.device
        facts = torch.cuda.get_device_properties(device)
        sm = 10 * facts.major + facts.minor
        n, k = weight.shape
        padded_n, padded_k = padded_shape(n, k)
        no_int = torch.empty(0, dtype=torch.int32, device=device)
        codes = torch.nn.functional.pad(weight.codes, (0, (padded_k - k) // 2, 0, padded_n - n))
        packed = torch.empty(padded_k // TILE, 2 * padded_n, dtype=torch.int32, device=device)
        repack = _build.load("repack", sm)["gptq_marlin_repack"]
        repack(codes.view(torch.int32).T.contiguous(), no_int, packed, padded_k, padded_n, 4)
        return MarlinWeight(
            gemm=_build.load(f"gemm_{problem.out_dtype}", sm)["gptq_marlin_gemm"],
            weight=packed,
            scales=prepare_scales(weight.scales, padded_n, padded_k, problem.dtype),
            global_scale=prepare_global_scale(weight.global_scale, problem.dtype),
            workspace=torch.zeros(facts.multi_processor_count, dtype=torch.int32, device=device),
            no_int=no_int,
            no_float=torch.empty(0, dtype=problem.dtype, device=device),
            n=n,
            k=k,
            padded_n=padded_n,
            padded_k=padded_k,
            atomic=uses_atomic_add(padded_n, padded_k, problem.dtype, sm),
        )

    def run(self, state: MarlinWeight, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        m = a.shape[0]
        if m == 0:  # as SGLang's wrapper does
            return
        if state.padded_k != state.k:
            a = torch.nn.functional.pad(a, (0, state.padded_k - state.k))
        exact = state.padded_n == state.n
        c = out if exact else a.new_empty(m, state.padded_n)
        rows = min(-(-m // TILE) * TILE, MAX_BLOCK_M)
        partial = torch.empty(
            state.workspace.shape[0] * rows * MAX_THREAD_N, dtype=torch.float32, device=a.device
        )
        state.gemm(
            a,
            state.weight,
            state.scales,
            state.global_scale,
            state.no_int,  # zero points
            state.no_int,  # group index
            state.no_int,  # its permutation
            c,
            partial,
            state.no_float,
            state.workspace,
            E2M1_TYPE_ID,
            True,  # is_k_full
            state.atomic,
            True,  # use_fp32_reduce
            False,  # is_zp_float
        )
        if not exact:
            out.copy_(c[:, : state.n])
