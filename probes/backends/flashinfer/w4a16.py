"""FlashInfer's `mm_bf16_fp4` backends (W4A16, NVFP4): ``flashinfer-w4a16-<its name>``.

Written from FlashInfer's documentation and source (0.7.2), not run on hardware yet: every one of
them needs SM100 or newer. A weight goes through FlashInfer's own `prepare_bf16_fp4_weights`, which
starts from the canonical layout (row-major codes, 128x4 scales).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...problem import Device, Fp4Tensor, Problem
from .._block_scaled import swizzled
from ..torch.dequant import not_dense
from ._support import ShapeLimits, Unavailable, mm_fp4, version
from ._support import cudnn_version as _cudnn_version

_BF16 = ("bf16",)
_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class W4A16Kernel:
    """One backend of `mm_bf16_fp4`. `refused` are compute capabilities its table lists and its
    preparation refuses. `cudnn` is the lowest version; `needs` a package."""

    api: str
    limits: ShapeLimits
    refused: tuple[int, ...] = ()
    cudnn: int | None = None
    needs: str | None = None
    distributions: tuple[str, ...] = ()


_DSL = ("nvidia-cutlass-dsl",)

SPECS: dict[str, W4A16Kernel] = {
    "flashinfer-w4a16-cudnn": W4A16Kernel(
        "cudnn",
        ShapeLimits({"nvfp4": 16}, out_dtypes=_BF16),
        cudnn=92301,
        distributions=("nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    ),
    # SM12x repacks tiles of 64 columns and multiplies 64 of k at a time; SM10x asks for 16.
    "flashinfer-w4a16-cute-dsl": W4A16Kernel(
        "cute-dsl",
        ShapeLimits({"nvfp4": 64}, n_step=64, out_dtypes=_BF16),
        refused=(110,),
        needs="cutlass",
        distributions=_DSL,
    ),
    "flashinfer-w4a16-cute-dsl-native": W4A16Kernel(
        "cute-dsl-native",
        ShapeLimits({"nvfp4": 16}, out_dtypes=_BF16, m_min=1, max_elements=_INT32),
        needs="cutlass",
        distributions=_DSL,
    ),
    "flashinfer-w4a16-blackwell-native": W4A16Kernel(
        "blackwell-native", ShapeLimits({"nvfp4": 16}, out_dtypes=_BF16, m_min=1)
    ),
    "flashinfer-w4a16-blackwell-tiled": W4A16Kernel(
        "blackwell-tiled", ShapeLimits({"nvfp4": 16}, n_step=64, out_dtypes=_BF16, m_min=1)
    ),
}


def functions() -> tuple[Any, Any]:
    """`prepare_bf16_fp4_weights` and `mm_bf16_fp4`. Raises Unavailable, one sentence."""
    mm_fp4()  # says why FlashInfer cannot be imported
    gemm = importlib.import_module("flashinfer.gemm")
    try:
        return gemm.prepare_bf16_fp4_weights, gemm.mm_bf16_fp4
    except AttributeError:
        raise Unavailable(f"FlashInfer {version()} has no mm_bf16_fp4") from None


def supported_sms(api: str) -> list[int]:
    """The compute capabilities FlashInfer's table has for a backend of `mm_bf16_fp4`."""
    _, multiply = functions()
    return [sm for sm in range(70, 200) if multiply.is_backend_supported(api, sm)]


def unsupported(name: str, problem: Problem, sm: int) -> str | None:
    """Why backend `name` cannot run `problem` on a compute capability. Needs no GPU."""
    spec = SPECS[name]
    try:
        sms = [s for s in supported_sms(spec.api) if s not in spec.refused]
        if sm not in sms:
            if not sms:
                return f"FlashInfer {version()} has no mm_bf16_fp4 backend {spec.api}"
            listed = ", ".join(map(str, sms))
            return f"FlashInfer {version()} runs {spec.api} on SM {listed}, not on SM {sm}"
    except Unavailable as error:
        return str(error)
    if reason := spec.limits.reason(name, problem):
        return reason
    if spec.needs and importlib.util.find_spec(spec.needs) is None:
        return f"{name} needs the nvidia-cutlass-dsl package, which is not installed"
    return _cudnn_version(name, spec.cudnn, sm) if spec.cudnn else None


@dataclass(frozen=True, slots=True)
class PreparedFp4Weight:
    """What `prepare_bf16_fp4_weights` gave, to be handed back as it is."""

    codes: torch.Tensor
    scales: torch.Tensor
    alpha: torch.Tensor | None


class FlashInferW4A16:
    """One backend of `mm_bf16_fp4`; its tactic is the one FlashInfer's autotuner picks."""

    activation = "bf16"
    reference_line = False

    def __init__(self, name: str) -> None:
        self._spec = SPECS[name]
        self.name = name
        self.layout = f"flashinfer-w4a16-{self._spec.api}"
        own = ("flashinfer-python", "flashinfer-jit-cache")
        self.distributions = (*own, *self._spec.distributions)

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        return not_dense(self, problem) or unsupported(self.name, problem, device.sm)

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Compile what a call of each problem's shape needs."""
        os.environ["MAX_JOBS"] = str(workers)  # what FlashInfer passes to ninja
        _, multiply = functions()
        for p in problems:
            if p.m == 0 or self.unsupported(p, device) is not None:
                continue
            weight = self._of(
                torch.zeros(p.n, p.k // 2, dtype=torch.uint8, device=device.torch),
                torch.zeros(p.n, p.k // 16, dtype=torch.uint8, device=device.torch),
                torch.ones((), device=device.torch),
            )
            a = torch.zeros(p.m, p.k, dtype=p.dtype, device=device.torch)
            self._call(multiply, weight, a, torch.empty(p.m, p.n, dtype=p.dtype, device=a.device))
        torch.cuda.synchronize(device.torch)

    def files(self) -> list[Path]:
        """The modules nvcc built, for the backends that have any."""
        if not self._spec.api.startswith("blackwell"):
            return []
        env = importlib.import_module("flashinfer.jit.env")
        roots = [env.FLASHINFER_JIT_DIR, env.FLASHINFER_AOT_DIR]
        return sorted(f for root in roots for f in Path(root).glob("*bf16_fp4*/*.so"))

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> PreparedFp4Weight:
        return self._of(weight.codes, weight.scales, weight.global_scale)

    def _of(
        self, codes: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor
    ) -> PreparedFp4Weight:
        prepare, _ = functions()
        alpha = global_scale.reshape(1)
        return PreparedFp4Weight(*prepare(codes, swizzled(scales), alpha, backend=self._spec.api))

    def run(
        self, state: PreparedFp4Weight, a: torch.Tensor, out: torch.Tensor, tactic: str
    ) -> None:
        if a.shape[0] == 0:
            return
        _, multiply = functions()
        self._call(multiply, state, a, out)

    def _call(
        self, multiply: Any, state: PreparedFp4Weight, a: torch.Tensor, out: torch.Tensor
    ) -> None:
        multiply(
            a,
            state.codes,
            state.scales,
            state.alpha,
            backend=self._spec.api,
            out_dtype=out.dtype,
            out=out,
        )


def backends() -> list[FlashInferW4A16]:
    """One backend for each of `SPECS`, whether or not FlashInfer is here or has it."""
    return [FlashInferW4A16(name) for name in SPECS]
