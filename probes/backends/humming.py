"""``humming``: the humming-kernels library (W4A16, NVFP4 and MXFP4), called as vLLM calls it.

As in vLLM, n is padded to a multiple of 256 and k to one of 128 when the weight is prepared (the
kernel itself reads unpadded activations and writes unpadded outputs), each layer has a stream-K
lock buffer of its own that all its streams share, and every call is `humming_forward`. fp16 with
MXFP4 saturates block scales outside 2^-14 to 2^15: vLLM does not use humming's remedy.

Tactics. humming picks a schedule from a list of m intervals and, left alone, compiles all of them
(about 33 for one weight) on the first call. A tactic here is the schedule of one interval, written
out by `encode`: it names the kernel completely, so a call with it compiles that kernel at most,
whatever its m, and never switches. ``"default"`` means the schedule of the call's own m.
"""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats import DTYPES
from ..problem import FORMATS, NVFP4, Device, Fp4Tensor, Problem
from . import DEFAULT_TACTIC, _call_sources
from ._humming import (
    DISTRIBUTION,
    PAD_K,
    PAD_N,
    compile_schedules,
    compiled_files,
    config_of,
    encode,
    heuristics,
    library,
    standard,
    tuning_json,
    unusable,
)

LOCKS = 2048
"""int32 stream-K locks of a layer, as humming's own layer allocates them."""

OPTIONS = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"}
"""What vLLM asks of a linear layer by default: fp32 accumulation, any schedule."""
COMPUTE = json.dumps(OPTIONS)


@dataclass(frozen=True, slots=True)
class HummingLayer:
    """What decides humming's schedules besides m: a layer's format, dtype and shape, and a GPU."""

    format: str
    out_dtype: str
    n: int
    k: int
    index: int

    @classmethod
    def of(cls, problem: Problem, index: int) -> HummingLayer:
        return cls(problem.format, problem.out_dtype, problem.n, problem.k, index)


def layer_config(layer: HummingLayer) -> Any:
    """humming's description of a dense W4A16 layer; no tensors are needed for it."""
    shape = (layer.n, layer.k)
    return config_of(layer.format, DTYPES[layer.out_dtype], shape, layer.index)


@functools.lru_cache(maxsize=4096)
def schedules(layer: HummingLayer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The highest m of each of humming's intervals, ascending, and the tactic each runs."""
    found = heuristics(layer_config(layer), OPTIONS, layer.index)
    return tuple(high for _, high, _ in found), tuple(encode(tuning) for _, _, tuning in found)


def schedule(layer: HummingLayer, m: int) -> str:
    """The tactic humming runs for `m` rows: that of the interval (low, high] m lies in.

    For m = 0, which no interval contains, that of the first.
    """
    highs, tactics = schedules(layer)
    return tactics[bisect.bisect_left(highs, m)]


@dataclass(frozen=True, slots=True)
class HummingWeight:
    """A weight in humming's layout. `tensors` and `config` are what `humming_forward` takes."""

    layer: HummingLayer
    config: Any
    tensors: dict[str, torch.Tensor]
    locks: torch.Tensor


class Humming:
    """humming-kernels for NVFP4 and MXFP4 weights and 16-bit activations."""

    name = "humming"
    activation = "bf16"
    layout = "humming"
    distributions = (DISTRIBUTION,)
    reference_line = False

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return "humming runs on CUDA GPUs only"
        if device.sm < 75 or (device.sm < 80 and problem.out_dtype == "bf16"):
            return f"humming needs SM80 or newer (SM75 with fp16), and this is SM{device.sm}"
        if problem.activation != "bf16":
            return "humming takes 16-bit activations here, not fp4"
        if problem.groups != 1:
            return f"humming computes dense problems here, and this has {problem.groups} groups"
        if problem.n % 8:
            return f"humming needs n to be a multiple of 8, and it is {problem.n}"
        return unusable()

    def tactics(self, problem: Problem, device: Device) -> Sequence[str]:
        """The one schedule humming's heuristics run for the problem's m on this GPU."""
        return (schedule(HummingLayer.of(problem, device.index), problem.m),)

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Compile the GEMM of each distinct schedule, and the kernel that repacks weights.

        Raises whatever humming raises; RuntimeError names the compiler's log.
        """
        index = device.index
        wanted: dict[tuple[HummingLayer, str], None] = {}
        for problem in problems:
            layer = HummingLayer.of(problem, index)
            wanted[layer, schedule(layer, problem.m)] = None
        for small in {(p.format, p.out_dtype): p for p in problems}.values():
            self.prepare(_zero_weight(small, device.torch), small)
        kernels = [(layer_config(layer), COMPUTE, tactic) for layer, tactic in wanted]
        compile_schedules(kernels, index, workers)
        torch.cuda.synchronize(index)

    def call_source(self) -> str:
        """See `backends.Backend`."""
        return _call_sources.HUMMING

    def files(self) -> Sequence[Path]:
        """The cubins of the GEMM kernels this process has compiled or loaded."""
        return compiled_files()

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> HummingWeight:
        device = weight.codes.device
        index = torch.cuda.current_device() if device.index is None else device.index
        n, k = weight.shape
        tensors = {"weight": weight.codes, "weight_scale": weight.scales}
        if weight.format == NVFP4:
            tensors["weight_scale_2"] = weight.global_scale.reshape(1)
        layer = HummingLayer(weight.format.name, problem.out_dtype, n, k, index)
        config = layer_config(layer)
        with torch.cuda.device(index):
            _, plain = standard(weight.format.name, tensors, problem.dtype)
            ready = library().transform_humming_tensors(config, plain)
        return HummingWeight(
            layer=layer,
            config=config,
            tensors={name: tensor.clone() for name, tensor in ready.items()},
            locks=torch.zeros(LOCKS, dtype=torch.int32, device=device),
        )

    def run(self, state: HummingWeight, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        """For m = 0 humming raises RuntimeError (no interval of m holds 0), in vLLM too."""
        if tactic == DEFAULT_TACTIC:
            tactic = schedule(state.layer, a.shape[0])
        library().humming_forward(
            state.config,
            inputs=a,
            **state.tensors,
            # vLLM passes no output; humming asserts that one that is passed has elements.
            outputs=out if a.shape[0] else None,
            locks=state.locks,
            compute_config=COMPUTE,
            tuning_config=tuning_json(tactic),
        )


def _zero_weight(problem: Problem, device: torch.device) -> Fp4Tensor:
    """The smallest weight of a problem's format that needs no padding, all zero."""
    fmt = FORMATS[problem.format]
    n, k = PAD_N, PAD_K

    def empty(columns: int) -> torch.Tensor:
        return torch.zeros(n, columns, dtype=torch.uint8, device=device)

    return Fp4Tensor(fmt, empty(k // 2), empty(k // fmt.block), torch.ones((), device=device))
