"""FlashInfer's unified `MoELayer` (0.7): routed experts of several kernel families, by one call.

Written from FlashInfer's documentation and source (0.7.4). `LAYERS` holds which SM, formats and
activations each takes, and why some are listed that cannot be run here at all. One candidate is in
a layer, so what runs is the backend that is named; its tactic is what FlashInfer's autotuner has
stored, and otherwise its fallback. It can be cut nowhere.

A layer holds a workspace for each bucket of tokens, and FlashInfer asks for one layer a thread and
stream: so there is one, whatever the weights. Under capture it makes no workspace, and an engine
has warmed the bucket before: so what is captured goes to the layer that was made first.

The routed scaling is the router's: what is not 1 is multiplied into its weights first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...formats import dequantise
from ...grouped.problem import ExpertsProblem, Gate
from ...grouped.tensors import ExpertWeights, Fp4Stack, zero_experts
from ...problem import Device
from ._support import Unavailable, version
from .experts_cutlass import up_first

CEILING = 8192
"""Tokens that a layer is made for; FlashInfer's default."""
FP4_TOKENS = "quantises its tokens to FP4, and routed experts are probed on bf16 tokens"
ANEW = "takes bf16 weights and quantises them anew, so that it is given no checkpoint's codes"
SEVERAL = "is one kernel over the GPUs of a group of ranks, and one GPU is probed"

TILEIRAS = "nvidia-cuda-tileiras nvidia-cuda-nvcc nvidia-nvvm"
"""It takes the assembler of its own version: with CUDA 13.0's it compiles nothing."""
PLAIN = ("swiglu",)
CLAMPED = ("swiglu", "swiglu-10")


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """One candidate of `MoELayer`.

    configs   FlashInfer's class of each weight format it takes
    view      what its weights are called in a `MoEWeightPack`, by format
    sms       the compute capabilities it runs on
    gates     the activations it computes; none of them adds a bias
    steps     what hidden and intermediate sizes must be multiples of, by format
    refused   why it is never run here, where it is not
    """

    configs: Mapping[str, str]
    view: Mapping[str, str]
    sms: tuple[int, ...]
    gates: tuple[str, ...] = PLAIN
    steps: Mapping[str, int] = field(default_factory=dict)
    needs: str | None = None
    """``cutile`` or ``cute-dsl``, where a further package must be installed."""
    refused: str | None = None
    distributions: tuple[str, ...] = ()


_DSL = ("nvidia-cutlass-dsl",)
_SM10X = (100, 103, 107)
_SM12X = (120, 121)

LAYERS: dict[str, LayerKernels] = {
    "flashinfer-cutile-experts": LayerKernels(
        {"nvfp4": "CuTileNvfp4Bf16Config", "mxfp4": "CuTileMxfp4Bf16Config"},
        {"nvfp4": "cutile_nvfp4", "mxfp4": "cutile_mxfp4"},
        (89, 90, *_SM12X),
        gates=(*CLAMPED, "relu2"),
        steps={"nvfp4": 64, "mxfp4": 32},
        needs="cutile",
        distributions=("cuda-tile", "nvidia-cuda-tileiras"),
    ),
    "flashinfer-trtllm-experts": LayerKernels(
        {"mxfp4": "TrtllmFp4Config"},
        {"mxfp4": "trtllm_fp4_routed"},
        (100, 107),
        gates=CLAMPED,
        steps={"mxfp4": 128},
        distributions=("flashinfer-cubin",),
    ),
    "flashinfer-prims-ts-experts": LayerKernels(
        {"mxfp4": "PrimsTsConfig"},
        {"mxfp4": "prims_ts"},
        (100, 103),
        gates=CLAMPED,
        steps={"mxfp4": 128},
        needs="cute-dsl",
        distributions=_DSL,
    ),
    "flashinfer-b12x-experts": LayerKernels(
        {"nvfp4": "B12xW4A16Config"},
        {"nvfp4": "b12x_w4a16"},
        _SM12X,
        gates=(*PLAIN, "relu2"),
        steps={"nvfp4": 64},
        needs="cute-dsl",
        distributions=_DSL,
    ),
    "flashinfer-sm12x-experts": LayerKernels(
        {"nvfp4": "SM12xNvfp4Bf16Config"},
        {"nvfp4": "cutile_nvfp4"},
        _SM12X,
        gates=(*PLAIN, "relu2"),
        steps={"nvfp4": 64},
        needs="cute-dsl",
        distributions=_DSL,
    ),
    "flashinfer-cutedsl-experts": LayerKernels(
        {"nvfp4": "CuteDslConfig"}, {"nvfp4": "cute_dsl"}, _SM10X, refused=ANEW
    ),
    "flashinfer-cutlass-nvfp4-experts": LayerKernels(
        {"nvfp4": "CutlassNvfp4Config"},
        {"nvfp4": "cutlass_nvfp4"},
        (*_SM10X, 110, *_SM12X),
        refused=FP4_TOKENS,
    ),
    "flashinfer-trtllm-nvfp4-experts": LayerKernels(
        {"nvfp4": "TrtllmFp4Config"}, {"nvfp4": "trtllm_fp4_routed"}, _SM10X, refused=FP4_TOKENS
    ),
    "flashinfer-b12x-nvfp4-experts": LayerKernels(
        {"nvfp4": "B12xNvfp4Config"}, {"nvfp4": "b12x_nvfp4"}, _SM12X, refused=FP4_TOKENS
    ),
    "flashinfer-megamoe-experts": LayerKernels(
        {"nvfp4": "", "mxfp4": ""}, {}, _SM10X, refused=SEVERAL
    ),
}


@functools.cache
def _unified_module() -> Any:
    """`flashinfer.fused_moe` with its `MoELayer`, or the `Unavailable` that says why not."""
    if importlib.util.find_spec("flashinfer") is None:
        return Unavailable("FlashInfer is not installed")
    try:
        module = importlib.import_module("flashinfer.fused_moe")
    except Exception as error:  # whatever its own dependencies raise
        return Unavailable(f"importing FlashInfer failed ({type(error).__name__}: {error})")
    if not hasattr(module, "MoELayer"):
        return Unavailable(f"FlashInfer {version()} has no MoELayer: it is since 0.7")
    return module


def unified() -> Any:
    """FlashInfer's module. Raises Unavailable, one sentence."""
    found = _unified_module()
    if isinstance(found, Unavailable):
        raise Unavailable(*found.args)
    return found


def unsupported(name: str, problem: ExpertsProblem, sm: int) -> str | None:
    """Why the candidate `name` cannot run `problem` on a compute capability. Needs no GPU."""
    spec = LAYERS[name]
    if sm not in spec.sms:
        listed = ", ".join(map(str, spec.sms))
        return f"{name} runs on SM {listed}, not on SM {sm}"
    if problem.format not in spec.configs:
        return f"{name} computes {' and '.join(spec.configs)} only, not {problem.format}"
    if spec.refused:
        return f"{name} {spec.refused}"
    if problem.gate not in spec.gates:
        has = ", ".join(spec.gates)
        return f"{name} computes the activations {has}, not {problem.gate}"
    step = spec.steps[problem.format]
    for what, size in (("intermediate", problem.n), ("hidden", problem.k)):
        if size % step:
            return f"{name} needs the {what} size to be a multiple of {step}, and it is {size}"
    return _missing_package(name)


def _missing_package(name: str) -> str | None:
    """A package that the candidate needs and this environment lacks, or FlashInfer itself."""
    spec = LAYERS[name]
    try:
        module = unified()
    except Unavailable as error:
        return str(error)
    absent = next((c for c in spec.configs.values() if not hasattr(module, c)), None)
    if absent:
        return f"FlashInfer {version()} has no {absent}"
    if spec.needs == "cute-dsl" and importlib.util.find_spec("cutlass") is None:
        return f"{name} needs the nvidia-cutlass-dsl package, which is not installed"
    if spec.needs == "cutile" and not _cutile():
        return f"{name} needs cuda-tile 1.4 or newer and its compiler (pip install {TILEIRAS})"
    return None


def _cutile() -> bool:
    """Whether FlashInfer finds cuTile and a compiler for the GPU that is there.

    FlashInfer asks for a module within ``cuda.tile``, which raises where only ``cuda`` is there.
    """
    try:
        return bool(importlib.import_module("flashinfer.cutile").is_cuda_tile_available())
    except ImportError:
        return False


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The experts in a backend's layout, a `MoEWeightPack`."""

    problem: ExpertsProblem
    pack: Any


class LayerExperts:
    """One candidate of `MoELayer`."""

    experts = True

    def __init__(self, name: str) -> None:
        self._spec = LAYERS[name]
        self.name = name
        self.layout = f"flashinfer-{next(iter(self._spec.view.values()), 'megamoe')}"
        own = ("flashinfer-python", "flashinfer-jit-cache")
        self.distributions = (*own, *self._spec.distributions)
        self._layers: dict[tuple[Any, ...], Any] = {}

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        return unsupported(self.name, problem, device.sm)

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> LayerWeights:
        module, fmt = unified(), problem.format
        config = getattr(module, self._spec.configs[fmt])
        w13, w2 = (
            _laid(stack, gated)
            for stack, gated in ((weights.w13, problem.act.gated), (weights.w2, False))
        )
        sizes = {
            "num_local_experts": problem.groups,
            "hidden_size": problem.k,
            "intermediate_size": problem.n,
            "activation": activation(module, problem.act),
        }
        if self._spec.view[fmt] in ("trtllm_fp4_routed", "prims_ts"):
            # Powers of two for scales, so that quantising anew gives the same values.
            whole = [_values(stack, problem) for stack in (w13, w2)]
            view = config.prepare_weights(*whole, quant=quantisation(module, fmt), **sizes)
        else:
            parts = [part for stack in (w13, w2) for part in _stored_parts(stack)]
            if self._spec.view[fmt] == "b12x_w4a16":  # it reads the sizes off the weights
                sizes = {"activation": sizes["activation"]}
            view = config.prepare_weights(*parts, **sizes)
        pack = module.MoEWeightPack()
        pack.prepare_for(self._spec.view[fmt], view)
        return LayerWeights(problem, pack)

    def run(
        self,
        state: LayerWeights,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        if not x.shape[0]:
            return
        scaling = state.problem.scaling
        router = weights if scaling == 1 else weights * scaling
        tokens = unified().MoEActivationPack(x, None, ids, router)
        out.copy_(self._layer(state.problem, x.device)(tokens, state.pack))

    def build(self, problems: Sequence[ExpertsProblem], device: Device, workers: int) -> None:
        """Compile what a call of each problem's shape needs, on experts of zeros."""
        for p in problems:
            if p.m == 0 or self.unsupported(p, device) is not None:
                continue
            state = self.prepare(zero_experts(p, device.torch), p)
            x = torch.zeros(p.m, p.k, dtype=p.dtype, device=device.torch)
            ids = torch.arange(p.m * p.top_k, device=device.torch).view(p.m, p.top_k) % p.groups
            router = torch.ones(p.m, p.top_k, device=device.torch)
            self.run(state, x, ids.int(), router, torch.empty_like(x), "default")
        torch.cuda.synchronize(device.torch)

    def _layer(self, problem: ExpertsProblem, device: torch.device) -> Any:
        """The layer of this thread and stream; under capture the one that was made first."""
        of = replace(problem, m=0, scaling=1.0)
        first = self._layers.get((of, device))
        if first is not None and torch.cuda.is_current_stream_capturing():
            return first
        stream = torch.cuda.current_stream(device).cuda_stream
        key = (of, device, threading.get_ident(), stream)
        if key not in self._layers:
            self._layers[key] = made = self._made(of, device)
            self._layers.setdefault((of, device), made)
        return self._layers[key]

    def _made(self, problem: ExpertsProblem, device: torch.device) -> Any:
        module = unified()
        candidate = getattr(module, self._spec.configs[problem.format])()
        config = module.MoEConfig(
            routing=module.RoutingConfig(num_experts=problem.groups, top_k=problem.top_k),
            quant=quantisation(module, problem.format),
            experts=module.ExpertConfig(intermediate_size=problem.n),
            activation=activation(module, problem.act),
            backend=module.BackendOptions((candidate,)),
            execution=module.ExecutionConfig(tune_max_num_tokens=CEILING),
        )
        return module.MoELayer(config, device=device)


def quantisation(module: Any, fmt: str) -> Any:
    """FlashInfer's name of FP4 weights on bf16 tokens."""
    return module.QuantConfig(weight=getattr(module.QuantFormat, fmt.upper()))


def activation(module: Any, gate: Gate) -> Any:
    """FlashInfer's name of what is between the GEMMs."""
    if not gate.gated:
        return module.ReLU2()
    limit = {} if gate.limit is None else {"limit": gate.limit}
    return module.SwiGLU(alpha=gate.alpha, beta=gate.offset, **limit)


def _laid(stack: Fp4Stack, gated: bool) -> Fp4Stack:
    """The same with up rows first."""
    return Fp4Stack(
        stack.format,
        up_first(stack.codes, gated),
        up_first(stack.scales, gated).contiguous(),
        stack.global_scale,
    )


def _stored_parts(stack: Fp4Stack) -> list[torch.Tensor]:
    """Codes, scales and, where the format has one, the global scale of each expert."""
    if not stack.format.has_global:
        return [stack.codes, stack.scales]
    return [stack.codes, stack.scales.view(torch.float8_e4m3fn), stack.global_scale]


def _values(stack: Fp4Stack, problem: ExpertsProblem) -> torch.Tensor:
    """bf16 (experts, rows, k)."""
    made = stack.codes.new_empty(
        *stack.codes.shape[:2], 2 * stack.codes.shape[2], dtype=problem.dtype
    )
    for expert in range(len(made)):
        made[expert] = dequantise(stack.expert(expert), problem.dtype)
    return made


def backends() -> list[LayerExperts]:
    """One backend for each of `LAYERS`, whether or not FlashInfer is here or has it."""
    return [LayerExperts(name) for name in LAYERS]
