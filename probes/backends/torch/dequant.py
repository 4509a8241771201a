"""The floor and the reference line: dequantise the FP4 operands with torch, then ``torch.mm``.

``torch-dequant`` (W4A16) and ``torch-dequant-w4a4`` dequantise on every call. The decoding is the
floors' own (`decoding`), so that a mistake in it cannot agree with the same mistake in the
reference that judges it. ``torch-bf16-resident`` dequantises once, when the weight is prepared.

What is rounded where. ``e2m1 * block scale`` needs at most 6 significand bits and is exact in
bf16 and fp32 (MXFP4 codes times 2^126 or 2^127 can pass the largest fp32, and become infinite in
every tactic; fp16 holds e4m3 scales but not e8m0, see `fits_16_bits`). The products are summed in
fp32, and `scaled_mm` multiplies that sum by the fp32 global scale before the one rounding to
the output dtype. The weight is never rounded.

TF32 needs no switch here: 16-bit activations and dequantised weights have at most 11 significand
bits, and TF32 keeps 11, so an fp32 product is the same with ``allow_tf32`` on (torch's default
is off). Process-wide precision flags belong to the engine and are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...decoding import Decoder
from ...formats import DTYPES
from ...problem import Device, Fp4Tensor, Problem
from .. import DEFAULT_TACTIC, Backend

TACTIC_DTYPES = {"fp32": torch.float32, **DTYPES}


def has_fp32_output(kind: str) -> bool:
    """Whether `torch.mm` can multiply 16-bit operands into fp32 (CUDA, torch 2.8 or newer)."""
    return kind == "cuda" and hasattr(torch.ops.aten.mm, "dtype")


def scaled_mm(a: torch.Tensor, w: torch.Tensor, alpha: torch.Tensor, out: torch.Tensor) -> None:
    """``out = alpha * a @ w.T`` with fp32 sums; a (m, k) and w (n, k) share a dtype.

    alpha is a float32 scalar on the device, out (m, n) bf16 or fp16.

    * fp32 operands, and 16-bit ones on CUDA with torch 2.8 or newer: one rounding, after alpha.
      (An fp32 output also keeps cuBLAS from reducing split-k partial sums in bf16.)
    * 16-bit operands on a CPU or an older torch: the product is rounded to 16 bits, multiplied in
      fp32, and rounded again. That is the same where alpha is a power of two and neither
      rounding leaves the normal range; otherwise it may be one unit in the last place off.
    """
    if a.shape[0] == 0:
        return
    if a.dtype == torch.float32:
        product = torch.mm(a, w.t())
    elif has_fp32_output(a.device.type):
        product = torch.mm(a, w.t(), out_dtype=torch.float32)
    else:
        product = torch.mm(a, w.t()).float()
    # alpha is 0-dim: were the product 16-bit, torch would round alpha to 16 bits first.
    torch.mul(product, alpha, out=out)


def fits_16_bits(problem: Problem) -> bool:
    """Whether the problem's 16-bit dtype holds its dequantised weights exactly.

    Weights are ``e2m1 * scale``: 2^-10 to 2688 with e4m3 scales, which both bf16 and fp16 hold;
    2^-128 and up with e8m0 scales, which only bf16 does. (Fp16 activations cannot move to bf16:
    its significand is 3 bits shorter.)
    """
    return problem.out_dtype == "bf16" or problem.format == "nvfp4"


def exact_tactics(problem: Problem, kind: str) -> tuple[str, ...]:
    """The dtypes to multiply in on a `kind` of device (``cpu``, ``cuda``), the fastest first.

    Without fp32 output there is no ``fp16``: the product before the global scale passes 65504.
    """
    direct = has_fp32_output(kind)
    if not fits_16_bits(problem) or (problem.out_dtype == "fp16" and not direct):
        return ("fp32",)
    return (problem.out_dtype, "fp32") if direct else ("fp32", problem.out_dtype)


def not_dense(backend: Backend, problem: Problem) -> str | None:
    """The reason a backend of dense problems gives for a grouped one, or another activation."""
    if problem.activation != backend.activation:
        return (
            f"{backend.name} takes {backend.activation} activations, and this problem has "
            f"{problem.activation} ones"
        )
    if problem.groups != 1:
        return (
            f"{backend.name} computes dense problems only, and this one has {problem.groups} groups"
        )
    return None


def first_if_default(tactic: str, known: Iterable[str]) -> str:
    """`tactic`, or the first known one for ``"default"``."""
    return next(iter(known)) if tactic == DEFAULT_TACTIC else tactic


@dataclass(frozen=True, slots=True)
class DequantWeight:
    """A weight in the plain layout with the tables each tactic decodes it by."""

    tensor: Fp4Tensor
    decoders: dict[str, Decoder]


class TorchDequant:
    """Dequantise and multiply, on CPU and CUDA: the floor that every choice falls back to.

    The tactic is the dtype multiplied in: ``fp32``, or the problem's 16-bit dtype where that is
    exact. For ``fp4`` activations `run` takes an `Fp4Tensor` as ``a`` and dequantises it as well;
    alpha is then the product of both global scales, rounded to fp32.
    """

    layout = "plain"
    distributions: tuple[str, ...] = ()
    reference_line = False

    def __init__(self, name: str, activation: str) -> None:
        self.name = name
        self.activation = activation

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return not_dense(self, problem)

    def tactics(self, problem: Problem, device: Device) -> Sequence[str]:
        """Where 16-bit operands are multiplied into fp32, that is all: fp32 ones give the same,
        and read and multiply twice as many bits."""
        names = exact_tactics(problem, device.kind)
        return names[:1] if has_fp32_output(device.kind) else names

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> DequantWeight:
        device = weight.codes.device
        names = exact_tactics(problem, device.type)
        return DequantWeight(
            weight, {t: Decoder.of(weight.format, TACTIC_DTYPES[t], device) for t in names}
        )

    def run(self, state: DequantWeight, a: Any, out: torch.Tensor, tactic: str) -> None:
        decode = state.decoders[first_if_default(tactic, state.decoders)]
        alpha = state.tensor.global_scale
        if isinstance(a, Fp4Tensor):
            alpha = alpha * a.global_scale
            a = decode(a)
        scaled_mm(a.to(decode.dtype), decode(state.tensor), alpha, out)


class Resident:
    """Weights dequantised once to the 16-bit dtype: what FP4 is compared with, never chosen.

    The global scale is folded into the weight in fp32 and the result rounded to 16 bits: exact
    where the scale is a power of two (and the product stays in the normal range), as an engine
    that serves a dequantised checkpoint would have it. 3.6 times the memory of FP4.
    """

    name = "torch-bf16-resident"
    activation = "bf16"
    layout = "dequantised"
    distributions: tuple[str, ...] = ()
    reference_line = True

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if not fits_16_bits(problem):
            return f"{self.name} cannot hold mxfp4's e8m0 scales in fp16"
        return not_dense(self, problem)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> torch.Tensor:
        """The dequantised weight, (n, k) in the problem's 16-bit dtype."""
        decode = Decoder.of(weight.format, torch.float32, weight.codes.device)
        return decode(weight).mul_(weight.global_scale).to(problem.dtype)

    def run(self, state: torch.Tensor, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        torch.mm(a, state.t(), out=out)


def torch_dequant() -> TorchDequant:
    return TorchDequant("torch-dequant", "bf16")


def torch_dequant_w4a4() -> TorchDequant:
    return TorchDequant("torch-dequant-w4a4", "fp4")
