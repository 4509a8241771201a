"""``marlin-experts``: SGLang's W4A16 routed experts on its JIT Marlin kernels.

This stands in for what SGLang 0.5.23 runs for ``--moe-runner-backend marlin`` (its default for
NVFP4 experts on SM80 to SM90), and mends nothing. Written from its sources and compiled for SM90.

* Slots are sorted by expert and cut into blocks of 8 to 64, the smallest that a balanced batch
  leaves at least a tenth free in; one GEMM, the activation, another GEMM whose last step multiplies
  by the router's weight, and a sum over a token's slots.
* NVFP4's block scales and global scales lose what those of the dense ``marlin`` lose.
* In NVFP4 blocks of threads that share a tile add their sums up by 16-bit atomics, in an order that
  varies (``reduce=atomic``); in MXFP4 one after another in float32 (``reduce=fp32``), behind locks
  that are made anew for each call. Either can be asked for in either format.
* MXFP4's hidden size is padded to 256 and its intermediate size to 128 (64 for DeepSeek-V4's
  clamped gates on SM90); NVFP4's intermediate size to 128 where nothing gates.
* ``ep`` is how SGLang calls them under expert parallelism: blocks of experts that are elsewhere may
  be anywhere, and each kernel counts them.

Differences from SGLang: experts outside [0, groups) become -1 in one launch in front, where its
dispatcher has done that; the same launch multiplies the router's weights by the routed scaling, as
SGLang's own MXFP4 router does, and both formats sum by the kernel that MXFP4 has (NVFP4 there sums
by sgl_kernel's compiled one, which multiplies by the scaling); the empty tensors for features FP4
lacks are made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...grouped.problem import ExpertsProblem
from ...grouped.slots import routed_batches
from ...grouped.tensors import ExpertWeights
from ...problem import Device
from .._experts import (
    MARLIN_BLOCKS,
    LayerSteps,
    listed,
    localised,
    marlin_block,
    refill,
    run_steps,
    up,
    widened,
    with_padding,
    without_padding,
)
from . import _build, _triton_files
from ._experts_layout import MarlinStack, padded_sizes, prepare_stack
from .marlin import E2M1_TYPE_ID, MAX_THREAD_N

LOCKS = 4
"""Of each SM."""
_SMALL_TOP_K = 32
"""Most slots that the kernel for one token aligns."""
_FEW_SLOTS, _FEW_BUCKETS = 64, 64
"""Most slots that SGLang aligns in Triton, and most buckets that it does not."""


@dataclass(frozen=True, slots=True)
class MarlinTactic:
    """How a layer is called: slots of a block, whether tiles' sums are added up by atomics, and
    whether as under expert parallelism."""

    block: int
    atomic: bool
    parallel: bool

    @classmethod
    def of(cls, tactic: str, block: int, atomic: bool) -> MarlinTactic:
        """A tactic by its name, where `block` and `atomic` are what SGLang chooses.

        Raises ValueError.
        """
        name, _, value = tactic.partition("=")
        if name == "block" and value.isdigit() and int(value) in MARLIN_BLOCKS:
            return cls(int(value), atomic, False)
        if name == "reduce" and value in ("atomic", "fp32"):
            return cls(block, value == "atomic", False)
        if tactic not in ("default", "ep"):
            raise ValueError(f"marlin-experts has no tactic {tactic!r}")
        return cls(block, atomic, tactic == "ep")


@dataclass(frozen=True, slots=True)
class MarlinLayer:
    """A layer's experts, and all that a call needs besides tokens.

    calls  SGLang's functions by the name of their unit, then theirs
    n, k   padded
    """

    problem: ExpertsProblem
    w13: MarlinStack
    w2: MarlinStack
    calls: dict[str, dict[str, Any]]
    sm: int
    sms: int
    n: int
    k: int
    no_int: torch.Tensor
    no_float: torch.Tensor

    @property
    def atomic(self) -> bool:
        """Whether SGLang adds sums up by atomics."""
        return self.problem.format == "nvfp4" and self.sm >= 90

    def how(self, tactic: str, tokens: int) -> MarlinTactic:
        block = marlin_block(tokens, self.problem.top_k, self.problem.groups)
        return MarlinTactic.of(tactic, block, self.atomic)


@dataclass(frozen=True, slots=True)
class Aligned:
    """Slots sorted by expert, each expert's padded to whole blocks, those of -1 first.

    slots    int32, at least ``count[0]``; the number of slots there are where there is padding
    experts  int32, one a block
    count    int32 (2,): slots with padding, and blocks of -1; (1,) under expert parallelism
    """

    slots: torch.Tensor
    experts: torch.Tensor
    count: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.slots, self.experts, self.count


def align(state: MarlinLayer, ids: torch.Tensor, how: MarlinTactic) -> Aligned:
    """SGLang's alignment of local ids, int32 (tokens, top_k) in [-1, groups)."""

    def empty(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=ids.device)

    tokens, top_k = ids.shape
    routing = state.calls["routing"]
    if tokens == 1 and top_k <= _SMALL_TOP_K and not how.parallel:
        found = Aligned(empty(top_k * how.block), empty(top_k), empty(2))
        routing["align_one"](ids, *found.tensors, how.block)
        return found
    slots, buckets = ids.numel(), state.problem.groups + 1  # one for -1
    room = slots * how.block if slots < buckets else slots + buckets * (how.block - 1)
    room = up(room, 4)
    found = Aligned(empty(room), empty(-(-room // how.block)), empty(1 if how.parallel else 2))
    small = state.calls["triton"].get("align")
    if small is not None and slots <= _FEW_SLOTS and buckets > _FEW_BUCKETS:
        counted = not how.parallel
        small(ids, buckets, how.block, *found.tensors, write_inactive_prefix_count=counted)
        return found
    run = routing["align_ep" if how.parallel else "align"]
    run(ids, buckets, how.block, *found.tensors, empty(buckets + 1), True)
    return found


@dataclass(frozen=True, slots=True)
class MarlinBatch:
    """A call's tokens, sorted: what both GEMMs take.

    weights  float32 (tokens, top_k); None: gemm2 multiplies by none
    locks    int32 (SMs * LOCKS,), zero
    """

    how: MarlinTactic
    aligned: Aligned
    weights: torch.Tensor | None
    locks: torch.Tensor
    top_k: int


class MarlinExperts:
    """SGLang's Marlin for NVFP4 and MXFP4 experts, bf16 activations.

    `finalize` alone multiplies by the router's weights in torch, which gemm2 does in a call.
    """

    experts = True
    name = "marlin-experts"
    layout = "marlin"
    distributions = ("sglang", "apache-tvm-ffi")

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return "marlin-experts runs on CUDA GPUs only"
        first = 80 if problem.format == "nvfp4" else 90
        if device.sm < first:
            return (
                f"SGLang's Marlin has {problem.format} experts from SM{first} on, and this is "
                f"SM{device.sm}"
            )
        act = problem.act
        if problem.format == "nvfp4" and act.biased:
            return "SGLang gives Marlin's NVFP4 experts no biases"
        if problem.format == "mxfp4" and not act.gated:
            return "SGLang prepares MXFP4 experts for Marlin with gates only"
        n, k = padded_sizes(problem, device.sm)
        if n % 64 or k % 128:
            return (
                "Marlin's NVFP4 experts need a hidden size of a multiple of 128 and an intermediate"
                f" one of 64, and these are {k} and {n}"
            )
        reason = _build.missing(_units((problem,)))
        if reason is None and act.offset and _triton_files.triton_file(_triton_files.OAI) is None:
            return "the installed SGLang does not have gpt-oss's activation where 0.5.23 has it"
        return reason

    def tactics(self, problem: ExpertsProblem, device: Device) -> Sequence[str]:
        """Every block but the one that is the default; the other way to add up; and as under expert
        parallelism."""
        chosen = marlin_block(problem.m, problem.top_k, problem.groups)
        found = ["default", *(f"block={size}" for size in MARLIN_BLOCKS if size != chosen)]
        if (device.sm or 0) >= 90:  # bf16 atomics, as SGLang has it
            found.append("reduce=fp32" if problem.format == "nvfp4" else "reduce=atomic")
        return [*found, "ep"]

    def build(self, problems: Sequence[ExpertsProblem], device: Device, workers: int) -> None:
        """Compile and load SGLang's kernels for these, and call those in Triton, to compile them.

        Raises RuntimeError, with the compiler's message, if that fails.
        """
        assert device.sm is not None
        _build.build(_units(problems), device.sm, workers)
        most: dict[ExpertsProblem, int] = {}
        for problem in problems:
            most[problem.at(0)] = max(most.get(problem.at(0), 0), problem.m)
        for problem, tokens in most.items():
            _try_triton(problem, tokens, device.sm, device.torch)
        torch.cuda.synchronize(device.torch)

    def files(self) -> Sequence[Path]:
        return _build.loaded_files()

    def kernel_of(self, tactic: str) -> str:
        return "marlin_moe"

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> MarlinLayer:
        device = weights.codes.device
        sm, sms = gpu(device)
        n, k = padded_sizes(problem, sm)
        calls = {unit: _build.load(unit, sm) for unit in _units((problem,))}
        calls["triton"] = triton_functions(problem, sm)
        repack, shards = calls["repack"]["gptq_marlin_repack"], 2 if problem.act.gated else 1
        return MarlinLayer(
            problem,
            prepare_stack(weights.w13, weights.b13, shards, (n, k), repack),
            prepare_stack(weights.w2, weights.b2, 1, (k, n), repack),
            calls,
            sm,
            sms,
            n,
            k,
            torch.empty(0, dtype=torch.int32, device=device),
            torch.empty(0, dtype=problem.dtype, device=device),
        )

    def update(self, state: MarlinLayer, weights: ExpertWeights, problem: ExpertsProblem) -> None:
        """New weights in the memory of those that were prepared."""
        fresh = self.prepare(weights, problem)
        refill(_stack_tensors(state.w13), _stack_tensors(fresh.w13))
        refill(_stack_tensors(state.w2), _stack_tensors(fresh.w2))

    def run(
        self,
        state: MarlinLayer,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        if not len(ids):
            return
        scaling = state.problem.scaling
        local, scaled = localised(ids, weights, state.problem.groups, -1, scaling)
        batch = _sglang_batch(state, local, scaled, tactic)
        steps = LayerSteps(
            lambda gemm, a, c: _experts_gemm(state, gemm, a, c, batch),
            lambda h13, h: _sglang_activate(state, h13, h),
            state.calls["around"]["sum"],
        )
        run_steps(state, x, out, steps)

    def permute(
        self, state: MarlinLayer, ids: torch.Tensor, tactic: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local, _ = localised(ids, None, state.problem.groups, -1)
        how = state.how(tactic, ids.shape[0])
        aligned = align(state, local, how)
        return listed(aligned.tensors, how.block, ids.numel())

    def gemm1(
        self, state: MarlinLayer, x: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        local, _ = localised(ids, None, state.problem.groups, -1)
        h13 = x.new_empty(ids.numel(), state.w13.n)
        _experts_gemm(state, 1, widened(x, state.k), h13, _sglang_batch(state, local, None, tactic))
        return without_padding(state, h13, ids)

    def activate(self, state: MarlinLayer, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        wide, n = with_padding(state, h13), state.problem.n
        h = h13.new_empty(wide.shape[0], state.n)
        _sglang_activate(state, wide, h)
        return h[:, :n].reshape(*h13.shape[:-1], n)

    def gemm2(
        self, state: MarlinLayer, h: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        local, _ = localised(ids, None, state.problem.groups, -1)
        y = h.new_empty(ids.numel(), state.k)
        rows = widened(h.reshape(-1, h.shape[-1]), state.n)
        _experts_gemm(state, 2, rows, y, _sglang_batch(state, local, None, tactic))
        return y[:, : state.problem.k].reshape(*ids.shape, state.problem.k)

    def finalize(
        self,
        state: MarlinLayer,
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        here = ((ids >= 0) & (ids < state.problem.groups)).unsqueeze(2)
        each = y.float() * (weights * state.problem.scaling).unsqueeze(2)
        total = y.new_empty(y.shape[0], y.shape[2])
        state.calls["around"]["sum"](torch.where(here, each, 0.0).to(y.dtype), total)
        return total


def gpu(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 is 9.0) and number of SMs."""
    facts = torch.cuda.get_device_properties(device)
    return 10 * facts.major + facts.minor, facts.multi_processor_count


def triton_functions(problem: ExpertsProblem, sm: int) -> dict[str, Any]:
    """What SGLang has in Triton for such a layer: ``oai``, and ``align`` where it is installed."""
    found: dict[str, Any] = {}
    if problem.act.offset:
        found["oai"] = _triton_files.function(_triton_files.OAI, sm)
    if problem.groups + 1 > _FEW_BUCKETS and _triton_files.triton_file(_triton_files.SMALL):
        found["align"] = _triton_files.function(_triton_files.SMALL, sm)
    return found


def _try_triton(problem: ExpertsProblem, tokens: int, sm: int, device: torch.device) -> None:
    """Compile what a layer's launches of up to `tokens` tokens call in Triton, but SGLang's
    alignment of few slots."""
    for ids, weights in routed_batches(problem, tokens, device):
        localised(ids, None, problem.groups, -1)
        localised(ids, weights, problem.groups, -1, problem.scaling)
    oai, act = triton_functions(problem, sm).get("oai"), problem.act
    if oai is not None:
        n, _ = padded_sizes(problem, sm)
        h13 = torch.zeros(1, 2 * n, dtype=problem.dtype, device=device)
        oai(h13, act.alpha, act.offset, act.limit, out=h13.new_empty(1, n))


def _units(problems: Sequence[ExpertsProblem]) -> list[str]:
    """What is built for these problems."""
    gemms = {
        _build.experts_unit(gemm, problem.format, parallel, problem.act.biased): None
        for problem in problems
        for parallel in (False, True)
        for gemm in (1, 2)
    }
    return [*gemms, "routing", "around", "repack"]


def _stack_tensors(stack: MarlinStack) -> list[torch.Tensor]:
    return [part.view(torch.uint8) for part in (stack.codes, stack.scales)] + [
        stack.global_scale,
        stack.bias,
    ]


def _sglang_batch(
    state: MarlinLayer, ids: torch.Tensor, weights: torch.Tensor | None, tactic: str
) -> MarlinBatch:
    tokens, top_k = ids.shape
    how = state.how(tactic, tokens)
    locks = torch.zeros(state.sms * LOCKS, dtype=torch.int32, device=ids.device)
    return MarlinBatch(how, align(state, ids, how), weights, locks, top_k)


def _experts_gemm(
    state: MarlinLayer, gemm: int, a: torch.Tensor, c: torch.Tensor, batch: MarlinBatch
) -> None:
    """gemm1 of tokens, or gemm2 of slots, into c (slots, n)."""
    stack, how, aligned = state.w13 if gemm == 1 else state.w2, batch.how, batch.aligned
    size = 0
    if not how.atomic:
        most = state.sms * LOCKS * how.block * MAX_THREAD_N
        size = min(stack.n * aligned.slots.numel(), most) * (2 if how.block == 8 else 1)
    weighted = gemm == 2 and batch.weights is not None
    biased = state.problem.act.biased
    unit = _build.experts_unit(gemm, state.problem.format, how.parallel, biased)
    groups = stack.scales.shape[1]
    state.calls[unit]["moe_wna16_marlin_gemm"](
        a,
        c,
        stack.codes,
        stack.bias,
        stack.scales,
        stack.global_scale,
        state.no_float,  # zero points
        state.no_int,  # group index
        state.no_int,  # its permutation
        batch.locks,
        aligned.slots,
        aligned.experts,
        aligned.count,
        state.no_float if batch.weights is None else batch.weights,
        state.no_float,  # permuted activations
        torch.empty(size, dtype=torch.float32, device=a.device),
        how.block,
        batch.top_k if gemm == 1 else 1,
        weighted,
        how.parallel,
        E2M1_TYPE_ID,
        a.shape[0],
        stack.n,
        stack.k,
        False,  # has_act_order
        biased,
        True,  # is_k_full
        False,  # has_zp
        groups,
        stack.k // groups,
        how.atomic,
        True,  # use_fp32_reduce
        False,  # is_zp_float
    )


def _sglang_activate(state: MarlinLayer, h13: torch.Tensor, h: torch.Tensor) -> None:
    """What SGLang has between the GEMMs, of (slots, rows of w13) into (slots, n)."""
    act = state.problem.act
    if not act.gated:
        torch.square(torch.nn.functional.relu(h13), out=h)
    elif act.offset:
        state.calls["triton"]["oai"](h13, act.alpha, act.offset, act.limit, out=h)
    elif act.limit is not None:
        state.calls["routing"]["silu_limited"](h13, h, "silu", act.limit)
    else:
        state.calls["around"]["silu"](h13, h, "silu")
