"""``vllm-marlin`` (W4A16): vLLM's Marlin kernels, prepared by vLLM's own code.

Written from vLLM's sources (0.11 to 0.33), not run on hardware yet. Needs vLLM in the interpreter
that runs the worker (``--python``). vLLM rescales block scales by a power of two where Marlin's
8-bit scales would lose small ones, and pads n to a multiple of 64.

The locks of one layer are shared by all streams that call it, as in vLLM.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ...problem import Device, Fp4Tensor, Problem
from ..torch.dequant import not_dense
from .cutlass import compiled_modules

_UTILS = "vllm.model_executor.layers.quantization.utils"
_GLOBAL_NAMES = ("weight_global_scale", "weight_scale_2")
"""What vLLM has called a layer's global scale."""
FIRST_SM = 75
STEPS = (64, 64)
"""What n (after vLLM's padding) and k are multiples of in Marlin's smallest tile."""


@dataclass(frozen=True, slots=True)
class VllmMarlinWeight:
    """A layer as vLLM's Marlin takes it."""

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None
    workspace: torch.Tensor
    n: int
    padded_n: int
    k: int


class VllmMarlin:
    name = "vllm-marlin"
    activation = "bf16"
    layout = "marlin"
    distributions = ("vllm",)
    reference_line = False

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        if reason := not_dense(self, problem):
            return reason
        if device.sm < FIRST_SM:
            return f"{self.name} needs SM {FIRST_SM} or newer, and this is SM {device.sm}"
        if problem.out_dtype == "bf16" and device.sm < 80:
            return f"{self.name} needs SM 80 for bf16, and this is SM {device.sm}"
        if problem.k % STEPS[1]:
            return f"{self.name} needs k to be a multiple of {STEPS[1]}, and it is {problem.k}"
        if importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed"
        return _missing()

    def files(self) -> Sequence[Path]:
        return compiled_modules()

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> VllmMarlinWeight:
        """vLLM prepares a layer in place; what it takes is the checkpoint's plain layout."""
        n, k = weight.shape
        kind = torch.float8_e4m3fn if weight.format.has_global else torch.uint8
        layer: Any = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight.codes.clone(), requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(weight.scales.view(kind), requires_grad=False)
        layer.output_size_per_partition, layer.input_size_per_partition = n, k
        layer.params_dtype = problem.dtype
        before = weight.global_scale.reshape(1)
        if weight.format.has_global:
            for name in _GLOBAL_NAMES:
                setattr(layer, name, torch.nn.Parameter(before, requires_grad=False))
        held = {name: getattr(layer, name, None) for name in _GLOBAL_NAMES}
        importlib.import_module(f"{_UTILS}.marlin_utils_fp4").prepare_fp4_layer_for_marlin(layer)
        # It replaces the one it knows.
        now = {name: getattr(layer, name, None) for name in _GLOBAL_NAMES}
        changed = [v for name, v in now.items() if v is not None and v is not held[name]]
        if weight.format.has_global and len(changed) != 1:
            raise RuntimeError("this vLLM calls a layer's global scale by another name")
        return VllmMarlinWeight(
            layer.weight.data,
            layer.weight_scale.data,
            changed[0].data if changed else None,
            layer.workspace,
            n,
            n + int(getattr(layer, "marlin_n_padding", 0)),
            k,
        )

    def run(self, state: VllmMarlinWeight, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        m = a.shape[0]
        if m == 0:
            return
        parts = _vllm_gemm()
        whole = state.padded_n == state.n
        c = out if whole else a.new_empty(m, state.padded_n)
        atomic = parts.should_use_atomic_add_reduce(
            m=m, n=state.padded_n, k=state.k, device=a.device, dtype=a.dtype
        )
        parts.gemm(
            a=a,
            c=c,
            b_q_weight=state.codes,
            b_bias=None,
            b_scales=state.scales,
            a_scales=None,
            global_scale=state.global_scale,
            b_zeros=None,
            g_idx=None,
            perm=None,
            workspace=state.workspace,
            b_q_type=parts.e2m1,
            size_m=m,
            size_n=state.padded_n,
            size_k=state.k,
            use_atomic_add=atomic,
            use_fp32_reduce=parts.fp32_reduce,
        )
        if not whole:
            out.copy_(c[:, : state.n])


@functools.cache
def _vllm_gemm() -> SimpleNamespace:
    """vLLM's GEMM and what it is called with. Raises ImportError and AttributeError."""
    marlin = importlib.import_module(f"{_UTILS}.marlin_utils")
    return SimpleNamespace(
        gemm=importlib.import_module("vllm._custom_ops").marlin_gemm,
        should_use_atomic_add_reduce=marlin.should_use_atomic_add_reduce,
        fp32_reduce=marlin.USE_FP32_REDUCE_DEFAULT,
        e2m1=importlib.import_module("vllm.scalar_type").scalar_types.float4_e2m1f,
    )


def _missing() -> str | None:
    """What this vLLM lacks, in one sentence."""
    try:
        parameters = inspect.signature(_vllm_gemm().gemm).parameters
        importlib.import_module(f"{_UTILS}.marlin_utils_fp4")
    except Exception as error:  # importing an engine may raise anything
        return f"vLLM's Marlin cannot be imported ({type(error).__name__}: {error})"
    if not {"a", "c", "a_scales", "global_scale", "b_q_type"} <= set(parameters):
        return "this vLLM's marlin_gemm takes other arguments than those this module knows"
    return None
