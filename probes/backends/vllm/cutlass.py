"""``vllm-cutlass`` (W4A4, NVFP4): vLLM's CUTLASS op ``torch.ops._C.cutlass_scaled_fp4_mm``.

Written from vLLM's sources (0.11 to 0.33), not run on hardware yet. Needs vLLM in the interpreter
that runs the worker (``--python``). Importing vLLM's compiled module registers the op; which
kernels it holds is asked of vLLM itself (`cutlass_scaled_mm_supports_fp4`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...problem import Device, Fp4Tensor, Problem
from .._block_scaled import Swizzled
from ..torch.dequant import not_dense

MODULES = ("_C", "_C_stable_libtorch")
"""vLLM's compiled modules that have held the op."""
OP = "cutlass_scaled_fp4_mm"
SUPPORTED_SMS = (100, 130)
"""From the first to below the second, in the op's dispatch; a build may hold fewer."""
STEP = 32


@functools.cache
def operator(name: str) -> Callable[..., Any]:
    """vLLM's op `name`. Raises RuntimeError, one sentence, where there is none."""
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError("vLLM is not installed")
    problems = []
    for module in MODULES:
        try:
            importlib.import_module(f"vllm.{module}")
        except ImportError as error:
            problems.append(str(error))
            continue
        namespace = getattr(torch.ops, module)
        if hasattr(namespace, name):
            op: Callable[..., Any] = getattr(namespace, name)
            return op
    why = f": {problems[0]}" if problems else ""
    raise RuntimeError(f"this vLLM has no op {name}{why}")


def compiled_modules() -> list[Path]:
    """vLLM's compiled modules: all of its kernels are in them."""
    found = importlib.util.find_spec("vllm")
    folders = found.submodule_search_locations or [] if found else []
    return sorted(f for d in folders for m in MODULES for f in Path(d).glob(f"{m}.*so"))


def supported_sm(sm: int) -> str | None:
    """Why vLLM does not run the op on a compute capability, as vLLM itself answers."""
    try:
        if operator("cutlass_scaled_mm_supports_fp4")(sm):
            operator(OP)
            return None
    except RuntimeError as error:
        return str(error)
    return f"this build of vLLM has no FP4 GEMM for SM {sm}"


class VllmCutlass:
    """`run` takes what `prepare_activation` returns."""

    name = "vllm-cutlass"
    activation = "fp4"
    layout = "swizzled"
    distributions = ("vllm",)
    reference_line = False

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        if reason := not_dense(self, problem):
            return reason
        first, end = SUPPORTED_SMS
        if not first <= device.sm < end:
            return f"{self.name} runs from SM {first} to below SM {end}, not on SM {device.sm}"
        if problem.format != "nvfp4":
            return f"{self.name} computes nvfp4 only, not {problem.format}"
        for letter, value in (("n", problem.n), ("k", problem.k)):
            if value % STEP:
                return f"{self.name} needs {letter} to be a multiple of {STEP}, and it is {value}"
        return supported_sm(device.sm)

    def files(self) -> Sequence[Path]:
        return compiled_modules()

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Swizzled:
        return Swizzled.of(weight)

    def prepare_activation(self, a: Fp4Tensor) -> Swizzled:
        return Swizzled.of(a)

    def run(self, state: Swizzled, a: Any, out: torch.Tensor, tactic: str) -> None:
        if a.codes.shape[0] == 0:
            return
        scales = (side.scales.view(torch.float8_e4m3fn) for side in (a, state))
        operator(OP)(out, a.codes, state.codes, *scales, a.alpha(state))
