"""Experts' weights in Marlin's layout, as SGLang prepares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...grouped.problem import ExpertsProblem
from ...grouped.tensors import Fp4Stack
from .._experts import padded_shards, up
from .marlin import TILE, permute_scales, prepare_global_scale
from .marlin import prepare_scales as nvfp4_scales

_BIAS_ORDER = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def padded_sizes(problem: ExpertsProblem, sm: int) -> tuple[int, int]:
    """The (intermediate, hidden) that SGLang computes with."""
    n, k = problem.n, problem.k
    if problem.format == "nvfp4":
        return (n if problem.act.gated else up(n, 128)), k
    return up(n, 64 if problem.gate == "swiglu-10" and sm == 90 else 128), up(k, 256)


@dataclass(frozen=True, slots=True)
class MarlinStack:
    """One matrix an expert in Marlin's layout, sizes padded.

    codes         int32 (experts, k/16, 2n)
    scales        (experts, k/block, n): S0E5M3 bytes held as e4m3, or e8m0
    global_scale  (experts,) in the activation's dtype; (0,) in MXFP4
    bias          (experts, n) in the activation's dtype; (0,) without
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    bias: torch.Tensor

    @property
    def n(self) -> int:
        return self.scales.shape[2]

    @property
    def k(self) -> int:
        return TILE * self.codes.shape[1]


def permute_bias(bias: torch.Tensor) -> torch.Tensor:
    """(experts, n) in the order the kernel's threads read it, by 32."""
    return bias.reshape(-1, 32)[:, _BIAS_ORDER].reshape(bias.shape).contiguous()


def prepare_stack(
    stack: Fp4Stack,
    bias: torch.Tensor | None,
    shards: int,
    size: tuple[int, int],
    repack: Callable[..., Any],
) -> MarlinStack:
    """`stack` in Marlin's layout: `shards` parts of rows, each padded to size[0], and columns to
    size[1]. `repack` is SGLang's kernel."""
    fmt, device, dtype = stack.format, stack.codes.device, torch.bfloat16
    rows, k = size
    n, experts = shards * rows, stack.codes.shape[0]
    none = torch.empty(0, dtype=torch.int32, device=device)
    packed = torch.empty(experts, k // TILE, 2 * n, dtype=torch.int32, device=device)
    scales = torch.empty(experts, k // fmt.block, n, dtype=torch.uint8, device=device)
    codes = padded_shards(stack.codes, shards, rows, k // 2)
    raw = padded_shards(stack.scales, shards, rows, k // fmt.block)
    for e in range(experts):
        repack(codes[e].view(torch.int32).T.contiguous(), none, packed[e], k, n, 4)
        if fmt.has_global:
            scales[e] = nvfp4_scales(raw[e], n, k, dtype).view(torch.uint8)
        else:
            scales[e] = permute_scales(raw[e].T.contiguous())
    held = torch.float8_e4m3fn if fmt.has_global else torch.float8_e8m0fnu
    empty = torch.empty(0, dtype=dtype, device=device)
    biased = empty
    if bias is not None:
        biased = permute_bias(
            padded_shards(bias.unsqueeze(2), shards, rows, 1).squeeze(2).to(dtype)
        )
    return MarlinStack(
        packed,
        scales.view(held),
        prepare_global_scale(stack.global_scale, dtype) if fmt.has_global else empty,
        biased,
    )
