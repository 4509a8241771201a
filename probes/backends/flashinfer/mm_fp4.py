"""FlashInfer's `mm_fp4` backends (W4A4), one backend each: ``flashinfer-<its name>``.

Written from FlashInfer's documentation and source (0.6.4 and 0.7.2) and, as far as running
kernels goes, not run on hardware yet: every one of them needs SM100 or newer. What is tested
without a GPU is `unsupported`, the operand layouts and the preparation.

The ``default`` tactic is a plain call of `mm_fp4`: whatever FlashInfer's autotuner has stored
for the shape in this process, and otherwise its fallback. The others are the tactics that the
backend's runner says are valid, written as JSON. With ``8x4`` in front the activation's scales are
in that layout, which trtllm's kernels read too and engines use for small m.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ....words import tuples
from ...layouts import padded, swizzle_8x4
from ...problem import FORMATS, Device, Format, Fp4Tensor, Problem
from .. import DEFAULT_TACTIC, _call_sources
from .._block_scaled import kept, pair_alpha, swizzled
from ..torch.dequant import not_dense
from ._support import SPECS, mm_fp4, unsupported
from ._tuner import interrupted


def _shuffled_rows(codes: torch.Tensor) -> torch.Tensor:
    """The row order trtllm's kernels read a weight in, as int64 (n,) on its device."""
    utils = importlib.import_module("flashinfer.utils")
    rows: torch.Tensor = utils.get_shuffle_matrix_a_row_indices(codes, 128)
    return rows.to(codes.device)


_keys = itertools.count()

SMALL = "8x4"
"""In front of a tactic's name: with the activation's scales in the 8x4 layout."""


@dataclass(frozen=True, slots=True)
class FlashInferWeight:
    """codes uint8 (n, k/2) and scales in the 128x4 layout (2-D); `key` tells weights apart."""

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    format: Format
    key: int


@dataclass(frozen=True, slots=True)
class FlashInferActivation:
    """codes uint8 (m, k/2), scales in the 128x4 layout, and alpha for each weight met so far.

    `scales_8x4` are the same scales in the 8x4 layout, for the backend that reads it.

    FlashInfer takes one alpha, the product of both global scales. An engine computes it when the
    model loads, so here it is computed in the first `run` of a pair and kept: a kernel of ours
    in front of every GEMM would also hide races from the regimes. The first `run` of a pair
    waits for it once; under capture, where it must not wait, alpha is recorded and not kept.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    scales_8x4: torch.Tensor | None = None
    alphas: dict[int, torch.Tensor] = field(default_factory=dict)

    def alpha(self, weight: FlashInferWeight, per_token: bool) -> torch.Tensor | None:
        """float32 (1,), or (m,) per token; None in MXFP4, which has no global scale."""
        if not weight.format.has_global:
            return None

        def make() -> torch.Tensor:
            alpha = pair_alpha(self, weight)
            return alpha.expand(self.codes.shape[0]).contiguous() if per_token else alpha

        return kept(self.alphas, weight.key, make)


@functools.lru_cache(maxsize=4096)
def parse_tactic(name: str) -> Any:
    """A tactic from its name. Raises ValueError for one that `tactics` did not write."""
    try:
        return tuples(json.loads(name))
    except ValueError:
        raise ValueError(f"{name!r} is not a FlashInfer tactic") from None


class FlashInfer:
    """One backend of `mm_fp4`; `run` takes what `prepare_activation` returns."""

    activation = "fp4"
    reference_line = False

    def __init__(self, name: str) -> None:
        spec = SPECS[name]
        self.name = name
        self.layout = spec.layout
        self.distributions = ("flashinfer-python", "flashinfer-jit-cache", *spec.distributions)
        self._spec = spec
        self._runners: dict[tuple[Any, ...], Any] = {}

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        return not_dense(self, problem) or unsupported(self.name, problem, device.sm)

    def tactics(self, problem: Problem, device: Device) -> Sequence[str]:
        """FlashInfer's default, then every tactic it says is valid for the problem (on a GPU)."""
        if device.kind != "cuda" or not torch.cuda.is_available() or problem.m == 0:
            return (DEFAULT_TACTIC,)
        chosen = interrupted(mm_fp4(), self._empty_call(problem, device))
        if chosen is None:
            return (DEFAULT_TACTIC,)
        shapes = [tuple(i.shape) if isinstance(i, torch.Tensor) else () for i in chosen.inputs]
        profile = SimpleNamespace(get_opt_shapes=lambda: shapes)
        valid = chosen.runner.get_valid_tactics(chosen.inputs, profile)
        names = [DEFAULT_TACTIC, *dict.fromkeys(json.dumps(tactic) for tactic in valid)]
        if self.layout != "shuffled":
            return names
        chosen = interrupted(mm_fp4(), self._empty_call(problem, device, SMALL))
        assert chosen is not None  # the same backend as above
        valid = chosen.runner.get_valid_tactics(chosen.inputs, profile)
        return [*names, SMALL, *(SMALL + json.dumps(t) for t in dict.fromkeys(valid))]

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Compile the module and the default kernels: minutes and 6 GB a unit for cutlass."""
        os.environ["MAX_JOBS"] = str(workers)  # what FlashInfer passes to ninja
        for problem in problems:
            if self.unsupported(problem, device) is None:
                mm_fp4()(**self._empty_call(problem, device))
        torch.cuda.synchronize(device.torch)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> FlashInferWeight:
        """The weight in the backend's layout; the codes are shared with `weight` if swizzled."""
        codes, scales = weight.codes, weight.scales
        if self.layout == "shuffled":
            rows = _shuffled_rows(codes)
            codes, scales = codes[rows], scales[rows]
        return FlashInferWeight(
            codes, swizzled(scales), weight.global_scale, weight.format, next(_keys)
        )

    def call_source(self) -> str:
        """See `backends.Backend`."""
        return _call_sources.flashinfer(
            self._spec.api, self.layout == "shuffled", self._spec.per_token
        )

    def prepare_activation(self, a: Fp4Tensor) -> FlashInferActivation:
        """The activation with its scales swizzled 128x4, for trtllm also 8x4."""
        small = None
        if self.layout == "shuffled":
            rows, cols = a.scales.shape
            small = swizzle_8x4(a.scales).view(padded(rows, cols, "8x4"))
        return FlashInferActivation(a.codes, swizzled(a.scales), a.global_scale, small)

    def run(self, state: FlashInferWeight, a: Any, out: torch.Tensor, tactic: str) -> None:
        small = tactic.startswith(SMALL)
        tactic = tactic.removeprefix(SMALL) or DEFAULT_TACTIC
        call = self._call(state, a, out, small)
        if tactic == DEFAULT_TACTIC:
            mm_fp4()(**call)
            return
        runner = self._pinned(call)
        inputs = [
            call["a"],
            call["b"],
            call["a_descale"],
            call["b_descale"],
            call["alpha"],
            call["out_dtype"],
            call["out"],
            call["block_size"],
            call["use_nvfp4"],
            _workspace(out.device),
        ]
        runner(inputs=inputs, tactic=parse_tactic(tactic))

    def _pinned(self, call: dict[str, Any]) -> Any:
        """The runner of this call's device, format and output dtype, built once."""
        eight = call["use_8x4_sf_layout"]
        key = (call["out"].device, call["out_dtype"], call["use_nvfp4"], eight)
        runner = self._runners.get(key)
        if runner is None:
            chosen = interrupted(mm_fp4(), call)
            if chosen is None:
                raise ValueError(f"{self.name} has no tactics to pin")
            runner = self._runners[key] = chosen.runner
        return runner

    def _call(
        self,
        state: FlashInferWeight,
        a: FlashInferActivation,
        out: torch.Tensor,
        small: bool = False,
    ) -> dict[str, Any]:
        """The arguments of `mm_fp4`, as 0.6.4 knows them too. `small`: with 8x4 scales."""
        if small and a.scales_8x4 is None:
            raise ValueError(f"{self.name} reads no 8x4 scales")
        return {
            "a": a.codes,
            "b": state.codes.t(),
            "a_descale": a.scales_8x4 if small else a.scales,
            "b_descale": state.scales.t(),
            "alpha": a.alpha(state, self._spec.per_token),
            "out_dtype": out.dtype,
            "out": out,
            "block_size": state.format.block,
            "use_8x4_sf_layout": small,
            "backend": self._spec.api,
            "use_nvfp4": state.format.has_global,
        }

    def _empty_call(self, problem: Problem, device: Device, tactic: str = "") -> dict[str, Any]:
        """A call of the problem's shapes on zeros."""

        def zeros(rows: int) -> Fp4Tensor:
            fmt = FORMATS[problem.format]
            codes, scales = (
                torch.zeros(rows, columns, dtype=torch.uint8, device=device.torch)
                for columns in (problem.k // 2, problem.k // fmt.block)
            )
            return Fp4Tensor(fmt, codes, scales, torch.ones((), device=device.torch))

        out = torch.empty(problem.m, problem.n, dtype=problem.dtype, device=device.torch)
        weight = self.prepare(zeros(problem.n), problem)
        activation = self.prepare_activation(zeros(problem.m))
        return self._call(weight, activation, out, tactic.startswith(SMALL))

    def files(self) -> list[Path]:
        """The compiled GEMM modules that exist, for the backends that are built by nvcc."""
        if self._spec.api != "cutlass":
            return []
        env = importlib.import_module("flashinfer.jit.env")
        roots = [env.FLASHINFER_JIT_DIR, env.FLASHINFER_AOT_DIR]
        return sorted(f for root in roots for f in Path(root).glob("fp4_gemm_cutlass*/*.so"))


def _workspace(device: torch.device) -> torch.Tensor:
    """The scratch buffer `mm_fp4` shares between all its calls on a device."""
    base = importlib.import_module("flashinfer.gemm.gemm_base")
    buffer: torch.Tensor = base._get_cache_buf(
        "mm_fp4_workspace", base.DEFAULT_WORKSPACE_SIZE, device
    )
    return buffer


def backends() -> list[FlashInfer]:
    """One backend for each of `SPECS`, whether or not FlashInfer is here or has it."""
    return [FlashInfer(name) for name in SPECS]
