"""``quack``: the W4A16 GEMM of quack-kernels (NVFP4 and MXFP4, written in the CuTe DSL).

The packed weight is decoded in registers. quack picks tile and split-k by m; an engine that calls
`gemm_w4a16` without saying which gets that, and it is the tactic ``"default"``. A tactic such as
``tm128-tn64-sk2`` pins all three, whatever the m.

With split-k the partial sums and the semaphores of a call lie in buffers that quack keeps for each
(n, m, tiles): all layers of one shape, and all streams, share them.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..problem import FORMATS, Device, Fp4Tensor, Problem
from . import DEFAULT_TACTIC
from .torch.dequant import not_dense

SMS = (90, 120, 121)
"""Where its decoding GEMM is written for: Hopper's WGMMA and the small Blackwell's MMA."""
STEPS = (128, 64)
"""What n and k are multiples of, without padding."""
TILES_N = (16, 32, 64, 128, 256)
_TACTIC = re.compile(r"tm(\d+)-tn(\d+)-sk(\d+)")


@dataclass(frozen=True, slots=True)
class QuackWeight:
    """A weight in quack's order: codes and scales repacked, the global scale on the host."""

    blob: torch.Tensor
    strip: torch.Tensor
    alpha: float
    format: str


class Quack:
    name = "quack"
    activation = "bf16"
    layout = "quack"
    distributions = ("quack-kernels", "nvidia-cutlass-dsl")
    reference_line = False

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        if reason := not_dense(self, problem):
            return reason
        if device.sm not in SMS:
            return f"{self.name} is for SM {', '.join(map(str, SMS))}, and not on SM {device.sm}"
        if problem.out_dtype != "bf16":
            return f"{self.name} takes and gives bf16 only"
        if problem.n % STEPS[0] or problem.k % STEPS[1]:
            return (
                f"{self.name} needs n to be a multiple of {STEPS[0]} and k of {STEPS[1]}, "
                f"and they are {problem.n} and {problem.k}"
            )
        if importlib.util.find_spec("quack") is None:
            return "quack-kernels is not installed"
        if importlib.util.find_spec("cutlass") is None:
            return "quack-kernels needs nvidia-cutlass-dsl, which is not installed"
        return None

    def tactics(self, problem: Problem, device: Device) -> Sequence[str]:
        """quack's own choice; the same tiles without split-k, and half and twice their width."""
        host = importlib.import_module("quack.operand_transform.host")
        tile_m, tile_n, split_k = host.pick_w4_cfg(
            max(problem.m, 1), problem.n, problem.k // STEPS[1], sm120=(device.sm or 0) >= 120
        )
        found = [DEFAULT_TACTIC]
        if split_k > 1:
            found.append(f"tm{tile_m}-tn{tile_n}-sk1")
        near = [n for n in TILES_N if n in (tile_n // 2, 2 * tile_n)]
        found += [f"tm{tile_m}-tn{n}-sk{split_k if n <= 128 else 1}" for n in near]
        return found

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> QuackWeight:
        quack = importlib.import_module("quack.gemm_w4")
        kind = torch.float8_e4m3fn if weight.format.has_global else torch.uint8
        name = weight.format.name
        blob, strip = quack.prepare_w4_weight(weight.codes, weight.scales.view(kind), name)
        return QuackWeight(blob, strip, float(weight.global_scale), name)

    def run(self, state: QuackWeight, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        if not a.shape[0]:
            return
        _gemm()(
            a,
            state.blob,
            state.strip,
            tensor_scale=state.alpha,
            out=out,
            wformat=state.format,
            **_pinned(tactic),
        )

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Compile every tactic of these problems by a first call each, on weights of zeros."""
        for problem in problems:
            where = device.torch
            codes = torch.zeros(problem.n, problem.k // 2, dtype=torch.uint8, device=where)
            fmt = FORMATS[problem.format]
            scales = torch.zeros(problem.n, problem.k // fmt.block, dtype=torch.uint8, device=where)
            one = torch.ones((), dtype=torch.float32, device=where)
            state = self.prepare(Fp4Tensor(fmt, codes, scales, one), problem)
            m = max(problem.m, 1)
            a = torch.zeros(m, problem.k, dtype=torch.bfloat16, device=where)
            out = torch.empty(m, problem.n, dtype=torch.bfloat16, device=where)
            for tactic in self.tactics(problem, device):
                self.run(state, a, out, tactic)
        torch.cuda.synchronize(device.torch)


def _pinned(tactic: str) -> dict[str, Any]:
    found = _TACTIC.fullmatch(tactic)
    if found is None:
        return {}
    tile_m, tile_n, split_k = map(int, found.groups())
    return {"tile_m": tile_m, "tile_n": tile_n, "split_k": split_k}


def _gemm() -> Any:
    return importlib.import_module("quack.gemm_w4").gemm_w4a16
