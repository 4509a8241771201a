"""``humming``: the humming-kernels library (W4A16, NVFP4 and MXFP4), called as vLLM calls it.

As in vLLM, n is padded to a multiple of 256 and k to one of 128 when the weight is prepared (the
kernel itself reads unpadded activations and writes unpadded outputs), each layer has a stream-K
lock buffer of its own that all its streams share, and every call is `humming_forward`. fp16 with
MXFP4 saturates block scales outside 2^-14 to 2^15: vLLM does not use humming's remedy.

Tactics. humming picks a schedule from a list of m intervals and, left alone, compiles all of them
(about 33 for one weight) on the first call. A tactic here is the schedule of one interval, written
out by `encode`: it names the kernel completely, so a call with it compiles that kernel at most,
whatever its m, and never switches. ``"default"`` means the schedule of the call's own m.

humming compiles with NVRTC where it can be imported, else nvcc; here nvcc is asked for unless
``HUMMING_COMPILER`` is set, because NVRTC also needs its builtins on the library path. Products
are kept in humming's own cache (``HUMMING_CACHE_DIR``, else ``~/.humming/cache``), which an engine
on the same node shares.
"""

from __future__ import annotations

import bisect
import functools
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..problem import DTYPES, FORMATS, NVFP4, Device, Fp4Tensor, Problem
from . import DEFAULT_TACTIC, _call_sources

PAD_N, PAD_K = 256, 128
"""The multiples vLLM lets humming pad a linear layer's weight to."""

LOCKS = 2048
"""int32 stream-K locks of a layer, as humming's own layer allocates them."""

COMPUTE = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"})
"""What vLLM asks of a linear layer by default: fp32 accumulation, any schedule."""

SCHEMAS = {
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "nvfp4"},
    "mxfp4": {"quant_method": "mxfp4"},
}

_SHAPE = re.compile(r"\d+(?:x\d+)+")
_FIELD = re.compile(r"([a-z][a-z0-9_]*)=([a-z0-9_]+)")


def encode(tuning: dict[str, Any]) -> str:
    """A schedule as a stable name: ``block_shape=16x128x64,num_stages=4,use_tma=true``.

    Keys in alphabetical order; values are booleans, integers, tuples of integers, lower-case words,
    or None. Raises ValueError for anything else. `decode` is its inverse.
    """

    def text(value: Any) -> str:
        if isinstance(value, Enum):
            value = value.value
        if value is None:
            return "none"
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (tuple, list)) and len(value) > 1:
            return "x".join(str(int(v)) for v in value)
        return str(value)

    name = ",".join(f"{key}={text(tuning[key])}" for key in sorted(tuning))
    decode(name)
    return name


def decode(tactic: str) -> dict[str, Any]:
    """The schedule a tactic names. Raises ValueError if it is not the name of one.

    A tactic may come from a database, and humming writes its values into C++ source: only numbers
    and words get through.
    """

    def value(text: str) -> Any:
        if text in ("true", "false", "none"):
            return {"true": True, "false": False, "none": None}[text]
        if _SHAPE.fullmatch(text):
            return [int(part) for part in text.split("x")]
        return int(text) if text.isdecimal() else text

    fields = [_FIELD.fullmatch(field) for field in tactic.split(",")]
    if not all(fields):
        raise ValueError(f"{tactic!r} is not the name of a humming schedule")
    return {field[1]: value(field[2]) for field in fields if field}


@functools.lru_cache(maxsize=4096)
def tuning_json(tactic: str) -> str:
    """The schedule a tactic names, as humming takes it; the key of humming's kernel cache."""
    tuning = decode(tactic)
    known = {*_humming().TuningConfig.get_field_names(), "use_f16_accum", "num_sms"}
    if not tuning.keys() <= known:
        odd = ", ".join(sorted(tuning.keys() - known))
        raise ValueError(f"this humming has no schedule with {odd}")
    return json.dumps(tuning)


@functools.cache
def _humming() -> Any:
    """humming's names that are used here, imported once, with its compiler chosen before."""
    os.environ.setdefault("HUMMING_COMPILER", "nvcc")
    from humming import config, forward, schema, transform, tune
    from humming.kernel.humming import HummingKernel

    return SimpleNamespace(
        TuningConfig=config.TuningConfig,
        HummingKernel=HummingKernel,
        BaseWeightSchema=schema.BaseWeightSchema,
        HummingInputSchema=schema.HummingInputSchema,
        prepare_layer_config=transform.prepare_layer_config,
        transform_humming_tensors=transform.transform_humming_tensors,
        get_heuristics_config=tune.get_heuristics_config,
        humming_forward=forward.humming_forward,
    )


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


@functools.lru_cache(maxsize=4096)
def layer_config(layer: HummingLayer) -> Any:
    """humming's description of a dense W4A16 layer; no tensors are needed for it."""
    h = _humming()
    dtype = DTYPES[layer.out_dtype]
    schema = h.BaseWeightSchema.from_config(SCHEMAS[layer.format])
    return h.prepare_layer_config(
        shape_n=layer.n,
        shape_k=layer.k,
        weight_schema=schema.to_humming_schema(dtype),
        input_schema=h.HummingInputSchema(),
        pad_n_to_multiple=PAD_N,
        pad_k_to_multiple=PAD_K,
        torch_dtype=dtype,
        device=torch.device("cuda", layer.index),
    )


@functools.lru_cache(maxsize=4096)
def schedules(layer: HummingLayer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The highest m of each of humming's intervals, ascending, and the tactic each runs."""
    device = torch.device("cuda", layer.index)
    options = json.loads(COMPUTE)
    found = _humming().get_heuristics_config(layer_config(layer), **options, device=device)
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
    distributions = ("humming-kernels",)
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
        if importlib.util.find_spec("humming") is None:
            return "humming is not installed (pip install humming-kernels)"
        return None

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
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            list(pool.map(lambda item: _compile_schedule(*item), wanted))
        torch.cuda.synchronize(index)

    def call_source(self) -> str:
        """See `backends.Backend`."""
        return _call_sources.HUMMING

    def files(self) -> Sequence[Path]:
        """The cubins of the GEMM kernels this process has compiled or loaded."""
        kernels = _humming().HummingKernel._id2kernel.values()
        return sorted({Path(kernel.kernel_filename) for kernel in kernels})

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> HummingWeight:
        h = _humming()
        device = weight.codes.device
        index = torch.cuda.current_device() if device.index is None else device.index
        n, k = weight.shape
        tensors = {"weight": weight.codes, "weight_scale": weight.scales}
        if weight.format == NVFP4:
            tensors["weight_scale_2"] = weight.global_scale.reshape(1)
        _, standard = h.BaseWeightSchema.from_config(SCHEMAS[weight.format.name]).convert_humming(
            tensors=tensors,
            shape_n_stacks=[n],
            shape_k_stacks=[k],
            param_dtype=problem.dtype,
            device=device,
        )
        layer = HummingLayer(weight.format.name, problem.out_dtype, n, k, index)
        config = layer_config(layer)
        with torch.cuda.device(index):
            ready = h.transform_humming_tensors(config, standard)
        return HummingWeight(
            layer=layer,
            config=config,
            tensors={name: tensor.clone() for name, tensor in ready.items()},
            locks=torch.zeros(LOCKS, dtype=torch.int32, device=device),
        )

    def run(self, state: HummingWeight, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        """For m = 0 humming 0.1.19 raises RuntimeError (no interval of m holds 0), in vLLM too."""
        if tactic == DEFAULT_TACTIC:
            tactic = schedule(state.layer, a.shape[0])
        _humming().humming_forward(
            state.config,
            inputs=a,
            **state.tensors,
            # vLLM passes no output; humming asserts that one that is passed has elements.
            outputs=out if a.shape[0] else None,
            locks=state.locks,
            compute_config=COMPUTE,
            tuning_config=tuning_json(tactic),
        )


def _compile_schedule(layer: HummingLayer, tactic: str) -> None:
    config = layer_config(layer).to_str()
    with torch.cuda.device(layer.index):
        _humming().HummingKernel.prepare_kernels(config, COMPUTE, tuning_json(tactic), layer.index)


def _zero_weight(problem: Problem, device: torch.device) -> Fp4Tensor:
    """The smallest weight of a problem's format that needs no padding, all zero."""
    fmt = FORMATS[problem.format]
    n, k = PAD_N, PAD_K

    def empty(columns: int) -> torch.Tensor:
        return torch.zeros(n, columns, dtype=torch.uint8, device=device)

    return Fp4Tensor(fmt, empty(k // 2), empty(k // fmt.block), torch.ones((), device=device))
