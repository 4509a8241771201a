"""``vllm-marlin-experts`` (W4A16): vLLM's compiled Marlin experts, prepared by vLLM's own code.

Written from vLLM 0.33's Python and its operators' schemas, not run on hardware yet. Needs vLLM in
the interpreter that runs the worker (``--python``). Its kernels are compiled for SM75, SM80, SM89
and SM120, so that elsewhere the driver compiles them from PTX.

* Slots are sorted into blocks as SGLang's are (`_experts.marlin_block`); NVFP4's block scales of
  all experts are rescaled by one power of two, and global scales stay float32.
* MXFP4's hidden size is padded to 256 and its intermediate size to 128; vLLM pads NVFP4's
  intermediate size to 64, or 128.
* Locks are shared by all layers on a stream, and made anew for what is captured in a graph.
* ``tile=K,N`` pins what a block of threads takes of a weight, and ``,blocks=B`` how many an SM
  runs, which vLLM's entry point takes and vLLM itself leaves to its heuristic.

Differences from vLLM: experts outside [0, groups) become one that the rank's expert map has
elsewhere, in one launch in front that also multiplies the router's weights by the routed scaling;
gpt-oss's gates are taken as halves (as vLLM has MiniMax-M3's) and not interleaved.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ...grouped.problem import ExpertsProblem
from ...grouped.tensors import ExpertWeights, Fp4Stack
from ...problem import Device
from .._experts import (
    MARLIN_BLOCKS,
    LayerSteps,
    listed,
    localised,
    marlin_block,
    padded_shards,
    refill,
    run_steps,
    up,
    widened,
    with_padding,
    without_padding,
)
from .cutlass import compiled_modules

_LAYERS = "vllm.model_executor.layers"
FIRST_SM = 80
LOCKS = 4
"""Of each SM."""
SMALL_TILES = ((128, 128), (64, 128), (128, 64))
LARGE_TILES = ((64, 256), (64, 128), (128, 64))
"""(k, n) of a block of threads, for up to 16 slots and for more."""
_STAGES = 4
_SHARED = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448, 110: 232448}
_LEAST_SHARED = 101376
"""Bytes of shared memory that a block of threads can have, of other SMs."""
_TACTIC = re.compile(r"tile=(\d+),(\d+),blocks=([124])")


@dataclass(frozen=True, slots=True)
class VllmTactic:
    """Slots of a block, and what is pinned of a block of threads; -1 is vLLM's choice."""

    block: int
    thread_k: int = -1
    thread_n: int = -1
    blocks: int = -1

    @classmethod
    def of(cls, tactic: str, block: int) -> VllmTactic:
        """A tactic by its name, where `block` is what vLLM chooses. Raises ValueError."""
        if tactic == "default":
            return cls(block)
        name, _, value = tactic.partition("=")
        if name == "block" and value.isdigit() and int(value) in MARLIN_BLOCKS:
            return cls(int(value))
        found = _TACTIC.fullmatch(tactic)
        if found is None:
            raise ValueError(f"vllm-marlin-experts has no tactic {tactic!r}")
        return cls(block, *(int(part) for part in found.groups()))


def shared_bytes(tile: tuple[int, int], block: int, group: int) -> int:
    """Shared memory that vLLM reckons a block of threads of (k, n) for `block` slots needs."""
    k, n = tile
    rows = up(block, 16)
    weights, sums = _STAGES * k * n // 2, rows * (n + 8) * 2
    both = max(weights, sums, min(weights, sums) + 2 * n)
    scales = _STAGES * -(-k // group) * n * 2
    return both + _STAGES * rows * k * 2 + scales + rows * 16


@dataclass(frozen=True, slots=True)
class VllmMatrices:
    """One matrix an expert, as vLLM's Marlin takes it."""

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def n(self) -> int:
        return self.scales.shape[2]

    @property
    def k(self) -> int:
        return 16 * self.codes.shape[1]


@dataclass(frozen=True, slots=True)
class VllmLayer:
    """A layer's experts; `n` and `k` are padded, and `expert_map` int32 (experts + 1,) has -1 for
    the one that stands for all that are elsewhere."""

    problem: ExpertsProblem
    w13: VllmMatrices
    w2: VllmMatrices
    n: int
    k: int
    sms: int
    expert_map: torch.Tensor

    def how(self, tactic: str, tokens: int) -> VllmTactic:
        return VllmTactic.of(tactic, marlin_block(tokens, self.problem.top_k, self.problem.groups))


@dataclass(frozen=True, slots=True)
class VllmBatch:
    """A call's tokens, sorted: what both GEMMs take. `weights` None: gemm2 multiplies by none."""

    how: VllmTactic
    slots: torch.Tensor
    experts: torch.Tensor
    count: torch.Tensor
    weights: torch.Tensor | None
    locks: torch.Tensor
    top_k: int


class VllmMarlinExperts:
    """vLLM's Marlin for NVFP4 and MXFP4 experts, bf16 activations.

    `finalize` alone multiplies by the router's weights in torch, which gemm2 does in a call.
    """

    experts = True
    name = "vllm-marlin-experts"
    layout = "vllm-marlin"
    distributions = ("vllm",)

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        if device.sm < FIRST_SM:
            return f"{self.name} needs SM {FIRST_SM} for bf16, and this is SM {device.sm}"
        if problem.format == "nvfp4" and problem.act.biased:
            return "vLLM prepares Marlin's NVFP4 experts without biases"
        if problem.format == "mxfp4" and not problem.act.gated:
            return "vLLM prepares MXFP4 experts for Marlin with gates only"
        if problem.format == "nvfp4" and problem.k % 64:
            return f"{self.name} needs a hidden size of a multiple of 64, and it is {problem.k}"
        if importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed"
        return _missing_experts()

    def tactics(self, problem: ExpertsProblem, device: Device) -> Sequence[str]:
        """Every block but the one that is the default; and with that one, every tile that divides
        both weights, with as many on an SM as fit."""
        block = marlin_block(problem.m, problem.top_k, problem.groups)
        shards, group = 2 if problem.act.gated else 1, 16 if problem.format == "nvfp4" else 32
        n, k = _vllm_sizes(problem)
        shared = _SHARED.get(device.sm or 0, _LEAST_SHARED)
        found = ["default", *(f"block={size}" for size in MARLIN_BLOCKS if size != block)]
        for tile in SMALL_TILES if block <= 16 else LARGE_TILES:
            if k % tile[0] or n % tile[0] or (shards * n) % tile[1] or k % tile[1]:
                continue
            for blocks in (1, 2, 4) if block <= 16 else (1, 2):
                room = shared if blocks == 1 else shared // blocks - 1024
                if shared_bytes(tile, block, group) <= room:
                    found.append(f"tile={tile[0]},{tile[1]},blocks={blocks}")
        return found

    def files(self) -> Sequence[Path]:
        return compiled_modules()

    def kernel_of(self, tactic: str) -> str:
        return "marlin_moe_wna16"

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> VllmLayer:
        device, parts = weights.codes.device, _vllm_experts()
        n, k = _vllm_sizes(problem)
        if weights.format.has_global:
            w13, w2 = _vllm_nvfp4(weights, problem, parts)
        else:
            w13, w2 = _vllm_mxfp4(weights, (n, k), parts)
        local = [*range(problem.groups), -1]
        expert_map = torch.tensor(local, dtype=torch.int32, device=device)
        return VllmLayer(problem, w13, w2, n, k, _sms(device), expert_map)

    def update(self, state: VllmLayer, weights: ExpertWeights, problem: ExpertsProblem) -> None:
        """New weights in the memory of those that were prepared."""
        fresh = self.prepare(weights, problem)
        refill(_vllm_tensors(state.w13), _vllm_tensors(fresh.w13))
        refill(_vllm_tensors(state.w2), _vllm_tensors(fresh.w2))

    def run(
        self,
        state: VllmLayer,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        if not len(ids):
            return
        groups = state.problem.groups
        local, scaled = localised(ids, weights, groups, groups, state.problem.scaling)
        batch = _vllm_batch(state, local, scaled, tactic)
        steps = LayerSteps(
            lambda gemm, a, c: _vllm_experts_gemm(state, gemm, a, c, batch),
            lambda h13, h: _vllm_activate(state, h13, h),
            lambda each, total: _vllm_experts().ops.moe_sum(each, total, local, state.expert_map),
        )
        run_steps(state, x, out, steps)

    def permute(
        self, state: VllmLayer, ids: torch.Tensor, tactic: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = _vllm_batch(state, _vllm_ids(state, ids), None, tactic)
        found = batch.slots, batch.experts, batch.count
        return listed(found, batch.how.block, ids.numel())

    def gemm1(
        self, state: VllmLayer, x: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        h13 = x.new_empty(ids.numel(), state.w13.n)
        batch = _vllm_batch(state, _vllm_ids(state, ids), None, tactic)
        _vllm_experts_gemm(state, 1, widened(x, state.k), h13, batch)
        return without_padding(state, h13, ids)

    def activate(self, state: VllmLayer, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        wide, n = with_padding(state, h13), state.problem.n
        wide = wide if state.problem.act.gated else wide.clone()  # vLLM's squares in place
        h = h13.new_empty(wide.shape[0], state.n)
        _vllm_activate(state, wide, h)
        return h[:, :n].reshape(*h13.shape[:-1], n)

    def gemm2(
        self, state: VllmLayer, h: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        y = h.new_empty(ids.numel(), state.k)
        rows = widened(h.reshape(-1, h.shape[-1]), state.n)
        _vllm_experts_gemm(
            state, 2, rows, y, _vllm_batch(state, _vllm_ids(state, ids), None, tactic)
        )
        return y[:, : state.problem.k].reshape(*ids.shape, state.problem.k)

    def finalize(
        self,
        state: VllmLayer,
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        each = (y.float() * (weights * state.problem.scaling).unsqueeze(2)).to(y.dtype)
        total = y.new_empty(y.shape[0], y.shape[2])
        _vllm_experts().ops.moe_sum(each, total, _vllm_ids(state, ids), state.expert_map)
        return total


def _vllm_sizes(problem: ExpertsProblem) -> tuple[int, int]:
    """The (intermediate, hidden) that vLLM computes with."""
    n, k = problem.n, problem.k
    if problem.format == "nvfp4":
        return up(n, 128 if k % 128 else 64), k
    return up(n, 128), up(k, 256)


def _vllm_nvfp4(
    weights: ExpertWeights, problem: ExpertsProblem, parts: Any
) -> tuple[VllmMatrices, VllmMatrices]:
    layer = SimpleNamespace(
        num_experts=problem.groups,
        hidden_size=problem.k,
        intermediate_size_per_partition=problem.n,
        params_dtype=problem.dtype,
    )

    def of(stack: Fp4Stack) -> tuple[torch.Tensor, ...]:
        return stack.codes, stack.scales.view(torch.float8_e4m3fn), stack.global_scale

    given = (*of(weights.w13), *of(weights.w2))
    made = parts.nvfp4(layer, *given, is_act_and_mul=problem.act.gated)
    first = VllmMatrices(made[0], made[1], made[2], None)
    return first, VllmMatrices(made[3], made[4], made[5], None)


def _vllm_mxfp4(
    weights: ExpertWeights, sizes: tuple[int, int], parts: Any
) -> tuple[VllmMatrices, VllmMatrices]:
    (n, k), block = sizes, weights.format.block
    layer = SimpleNamespace(params_dtype=torch.bfloat16)
    w13, w2, b13, b2 = weights.w13, weights.w2, weights.b13, weights.b2
    made = parts.mxfp4(
        layer,
        padded_shards(w13.codes, 2, n, k // 2),
        padded_shards(w2.codes, 1, k, n // 2),
        padded_shards(w13.scales, 2, n, k // block),
        padded_shards(w2.scales, 1, k, n // block),
        None if b13 is None else padded_shards(b13.unsqueeze(2), 2, n, 1).squeeze(2),
        None if b2 is None else padded_shards(b2.unsqueeze(2), 1, k, 1).squeeze(2),
    )
    first = VllmMatrices(made[0], made[2], None, made[4])
    return first, VllmMatrices(made[1], made[3], None, made[5])


def _vllm_tensors(matrices: VllmMatrices) -> list[torch.Tensor]:
    parts = (matrices.codes, matrices.scales.view(torch.uint8))
    more = (matrices.global_scale, matrices.bias)
    return [*parts, *(each for each in more if each is not None)]


def _vllm_ids(state: VllmLayer, ids: torch.Tensor) -> torch.Tensor:
    return localised(ids, None, state.problem.groups, state.problem.groups)[0]


def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_locks: dict[tuple[torch.device, int], torch.Tensor] = {}
"""By device and stream."""


def _stream_locks(device: torch.device, sms: int) -> torch.Tensor:
    """int32 (SMs * LOCKS,), zero between calls."""

    def zeros() -> torch.Tensor:
        return torch.zeros(sms * LOCKS, dtype=torch.int32, device=device)

    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return zeros()
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _locks:
        _locks[key] = zeros()
    return _locks[key]


def _vllm_batch(
    state: VllmLayer, ids: torch.Tensor, weights: torch.Tensor | None, tactic: str
) -> VllmBatch:
    """As vLLM's moe_align_block_size has it for a rank of several."""

    def empty(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=ids.device)

    tokens, top_k = ids.shape
    how, slots, experts = state.how(tactic, tokens), ids.numel(), state.expert_map.numel()
    room = slots + experts * (how.block - 1)
    if slots < experts:
        room = min(slots * how.block, room)
    found = empty(room), empty(-(-room // how.block)), empty(1)
    _vllm_experts().ops.moe_align_block_size(ids, experts, how.block, *found, state.expert_map)
    locks = _stream_locks(ids.device, state.sms)
    return VllmBatch(how, *found, weights, locks, top_k)


def _vllm_experts_gemm(
    state: VllmLayer, gemm: int, a: torch.Tensor, c: torch.Tensor, batch: VllmBatch
) -> None:
    """gemm1 of tokens, or gemm2 of slots, into c (slots, n)."""
    matrices, how, parts = state.w13 if gemm == 1 else state.w2, batch.how, _vllm_experts()
    weights = batch.weights
    parts.ops.moe_wna16_marlin_gemm(
        a,
        c,
        matrices.codes,
        matrices.bias,
        matrices.scales,
        None,  # scales of activations
        matrices.global_scale,
        None,  # zero points
        batch.locks,
        batch.slots,
        batch.experts,
        batch.count,
        torch.empty(0, dtype=torch.float32, device=a.device) if weights is None else weights,
        moe_block_size=how.block,
        top_k=batch.top_k if gemm == 1 else 1,
        mul_topk_weights=gemm == 2 and weights is not None,
        b_q_type=parts.e2m1,
        size_m=a.shape[0],
        size_n=matrices.n,
        size_k=matrices.k,
        use_atomic_add=False,
        use_fp32_reduce=True,
        is_zp_float=False,
        thread_k=how.thread_k,
        thread_n=how.thread_n,
        blocks_per_sm=how.blocks,
    )


def _vllm_activate(state: VllmLayer, h13: torch.Tensor, h: torch.Tensor) -> None:
    """What vLLM has between the GEMMs, of (slots, rows of w13) into (slots, n)."""
    act, parts = state.problem.act, _vllm_experts()
    config = parts.config(clamp_limit=act.limit, alpha=act.alpha, beta=act.offset)
    kind = parts.kinds.SILU if not act.offset else parts.kinds.SWIGLUOAI_UNINTERLEAVE
    if not act.gated:
        kind = parts.kinds.RELU2_NO_MUL
    parts.activate(kind, h, h13, activation_config=config)


@functools.cache
def _vllm_experts() -> SimpleNamespace:
    """vLLM's operators, and what prepares weights for them. Raises ImportError, AttributeError."""
    prepare = importlib.import_module(f"{_LAYERS}.quantization.utils.marlin_utils_fp4")
    activation = importlib.import_module(f"{_LAYERS}.fused_moe.activation")
    return SimpleNamespace(
        ops=importlib.import_module("vllm._custom_ops"),
        e2m1=importlib.import_module("vllm.scalar_type").scalar_types.float4_e2m1f,
        nvfp4=prepare.prepare_nvfp4_moe_layer_for_marlin,
        mxfp4=prepare.prepare_moe_mxfp4_layer_for_marlin,
        activate=activation.apply_moe_activation,
        config=activation.ApplyMoEActivationConfig,
        kinds=activation.MoEActivation,
    )


def _missing_experts() -> str | None:
    """What this vLLM lacks, in one sentence."""
    try:
        parameters = inspect.signature(_vllm_experts().ops.moe_wna16_marlin_gemm).parameters
    except Exception as error:  # importing an engine may raise anything
        return f"vLLM's Marlin experts cannot be imported ({type(error).__name__}: {error})"
    if not {"a_scales", "global_scale", "b_q_type", "thread_k", "blocks_per_sm"} <= set(parameters):
        return "this vLLM's moe_wna16_marlin_gemm takes other arguments than 0.33's"
    return None
