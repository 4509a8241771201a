"""humming-kernels' grouped GEMMs (W4A16, NVFP4 and MXFP4), called as vLLM's expert layers do.

One backend for each of humming's three gemm types, since an engine has one for all of a model
(``VLLM_HUMMING_MOE_GEMM_TYPE``, ``SGLANG_HUMMING_MOE_GEMM_TYPE``; the masked one where experts are
fed by a low-latency all-to-all):

* ``humming-indexed``: blocks of sorted slots, rows are gathered and scattered by the kernel
* ``humming-grouped``: `grouped_contiguous`, rows lie sorted, one offset an expert
* ``humming-masked``: `grouped_masked`, as many rows for each expert, of which some are used

w13 and w2 share one buffer of stream-K locks, as one layer's do in vLLM, on all its streams.

Tactics. ``rows-64``: the two schedules that humming's rule has for 64 slots, whatever the call's
own number is; ``rows-64-invariant``: those of its batch-invariant rule, which never splits k (so it
takes no locks). ``default`` is the rule for the call's own number. fp16 accumulation is for
fp16 activations only, which these problems do not have.

Sorting and finalizing are `slots`', since the engines' own kernels do that there; so are moving
rows and the activation with 0.1.12. Newer versions bring kernels for these two, which vLLM uses,
and so does this.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..grouped.problem import ExpertsProblem, Gate
from ..grouped.slots import (
    activate_rows,
    combine_rows,
    compile_slots,
    gather_slots,
    mask_rows,
    run_top_ks,
    sort_slots,
    spread_rows,
)
from ..grouped.tensors import ExpertWeights, Fp4Stack
from ..problem import FORMATS, Device
from . import DEFAULT_TACTIC
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

LOCKS_PER_SM = 8
"""int32 stream-K locks of an expert layer, as vLLM makes them."""
MOST_MASKED = 512
"""Tokens that one masked call takes: what there is more goes in further calls, as an engine's
low-latency dispatch has it."""
_LAST_CANDIDATE = 65408
"""Rows beyond which humming's rule no longer changes."""
_USES = {
    "indexed": ("sort", "slots"),
    "grouped_contiguous": ("sort", "spread", "places", "slots"),
    "grouped_masked": ("spread", "places", "slots"),
}
"""What each gemm type calls of `slots`, in a call or as a stage by itself."""
_TACTIC = re.compile(r"rows-(\d{1,5})(-invariant)?")


def candidate(rows: int, sm: int) -> int:
    """The number of rows that humming asks its rule about for so many: the upper end of the
    smallest interval of its list for expert layers, the same in all known versions."""
    for few in (1, 2, 4, 8):
        if rows <= few:
            return few
    step = 8 if sm == 90 else 16
    for above, wider in ((1024, 16), (2048, 32), (4096, 64), (16384, 128)):
        if rows > above:
            step = max(step, wider)
    return min(-(-rows // step) * step, _LAST_CANDIDATE)


@dataclass(frozen=True, slots=True)
class HummingStack:
    """What decides the schedules of a matrix an expert besides rows: its description and a GPU."""

    format: str
    n: int
    k: int
    groups: int
    biased: bool
    index: int

    @property
    def config(self) -> Any:
        """humming's description."""
        return config_of(
            self.format, torch.bfloat16, (self.n, self.k), self.index, self.groups, self.biased
        )


def stacks(problem: ExpertsProblem, index: int) -> tuple[HummingStack, HummingStack]:
    """Those of w13 and w2."""
    biased = problem.act.biased
    return (
        HummingStack(problem.format, problem.rows13, problem.k, problem.groups, biased, index),
        HummingStack(problem.format, problem.k, problem.n, problem.groups, biased, index),
    )


@dataclass(frozen=True, slots=True)
class HummingRule:
    """What humming's rule is asked with besides a layer and rows."""

    gemm_type: str
    invariant: bool

    @property
    def options(self) -> dict[str, Any]:
        return {
            "use_batch_invariant": self.invariant,
            "use_f16_accum": False,
            "gemm_type": self.gemm_type,
        }

    @property
    def compute(self) -> str:
        """As a call takes it."""
        return json.dumps(self.options)


@functools.lru_cache(maxsize=1 << 14)
def schedule_for(stack: HummingStack, rule: HummingRule, rows: int) -> str:
    """The name of the schedule that the rule has for so many rows."""
    return encode(heuristics(stack.config, rule.options, stack.index, rows))


@functools.lru_cache(maxsize=1 << 14)
def block_of(schedule: str) -> int:
    """Rows of one block of a schedule."""
    return int(json.loads(tuning_json(schedule))["block_shape"][0])


@dataclass(frozen=True, slots=True)
class HummingPrepared:
    """Experts in humming's layouts. `w13` and `w2` are what `humming_forward` takes by name."""

    problem: ExpertsProblem
    sm: int
    of13: HummingStack
    of2: HummingStack
    w13: dict[str, torch.Tensor]
    w2: dict[str, torch.Tensor]
    locks: torch.Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """The schedules of one call."""

    rule: HummingRule
    of13: str
    of2: str


class HummingExperts:
    """One of humming's gemm types; every stage by itself, and `run` one after another."""

    experts = True
    layout = "humming-experts"
    distributions = (DISTRIBUTION,)

    def __init__(self, name: str, gemm_type: str) -> None:
        self.name = name
        self.gemm_type = gemm_type

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return "humming runs on CUDA GPUs only"
        if device.sm < 80:
            return f"humming needs SM80 or newer for bf16, and this is SM{device.sm}"
        return unusable()

    def tactics(self, problem: ExpertsProblem, device: Device) -> Sequence[str]:
        """The rule for the problem's slots, and the batch-invariant one."""
        assert device.sm is not None
        name = f"rows-{candidate(problem.m * problem.top_k, device.sm)}"
        return name, f"{name}-invariant"

    def build(self, problems: Sequence[ExpertsProblem], device: Device, workers: int) -> None:
        """Compile the GEMMs of both tactics of each problem, and what is around them.

        Raises whatever humming raises; RuntimeError names the compiler's log.
        """
        index = device.index
        wanted: dict[tuple[HummingStack, HummingRule, str], None] = {}
        for problem in problems:
            for tactic in self.tactics(problem, device):
                rows, rule = self._rule(tactic, 0)
                for stack in stacks(problem, index):
                    wanted[stack, rule, schedule_for(stack, rule, rows)] = None
        for format_ in {p.format for p in problems}:
            _prepare_stack(_smallest(format_, device.torch), None, torch.bfloat16)
        kernels = [(stack.config, rule.compute, name) for stack, rule, name in wanted]
        compile_schedules(kernels, index, workers)
        most: dict[ExpertsProblem, int] = {}
        for problem in problems:
            most[problem.at(0)] = max(most.get(problem.at(0), 0), problem.m)
        for problem, tokens in most.items():
            self._try_moving(problem, device)
            compile_slots(problem, tokens, device.torch, _USES[self.gemm_type])
        torch.cuda.synchronize(index)

    def _try_moving(self, problem: ExpertsProblem, device: Device) -> None:
        """Compile what moves and activates this layer's rows."""
        of13, of2 = stacks(problem, device.index)
        x = torch.zeros(1, problem.k, dtype=torch.bfloat16, device=device.torch)
        ids = torch.zeros(1, problem.top_k, dtype=torch.int32, device=device.torch)
        masked = self.gemm_type == "grouped_masked"
        # How many experts a token has is compiled into humming's mover.
        for top_k in run_top_ks(problem) if self.gemm_type != "indexed" else ():
            places = torch.arange(top_k, dtype=torch.int32, device=device.torch).view(1, -1)
            _spread_masked(of13.config, x, places, problem.groups if masked else top_k)
        h13 = x.new_zeros(problem.groups, problem.rows13)
        # A stage by itself is not told which rows are used.
        _activate(of2.config, h13, problem.act, problem.n)
        if masked:
            counts = mask_rows(ids, problem.groups).counts
            _activate(of2.config, h13, problem.act, problem.n, expert_tokens=counts)
        else:
            total = sort_slots(ids, problem.groups).total
            _activate(of2.config, h13, problem.act, problem.n, num_valid_tokens=total)

    def files(self) -> Sequence[Path]:
        """The cubins of the GEMM kernels this process has compiled or loaded."""
        return compiled_files()

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> HummingPrepared:
        device = weights.codes.device
        index = torch.cuda.current_device() if device.index is None else device.index
        facts = torch.cuda.get_device_properties(index)
        of13, of2 = stacks(problem, index)
        with torch.cuda.device(index):
            w13 = _prepare_stack(weights.w13, weights.b13, problem.dtype, of13.config)
            w2 = _prepare_stack(weights.w2, weights.b2, problem.dtype, of2.config)
        locks = torch.zeros(
            LOCKS_PER_SM * facts.multi_processor_count, dtype=torch.int32, device=device
        )
        sm = 10 * facts.major + facts.minor
        return HummingPrepared(problem, sm, of13, of2, w13, w2, locks)

    def update(
        self, state: HummingPrepared, weights: ExpertWeights, problem: ExpertsProblem
    ) -> None:
        """Give prepared experts new values in place."""
        made = self.prepare(weights, problem)
        for mine, new in ((state.w13, made.w13), (state.w2, made.w2)):
            for name, tensor in mine.items():
                tensor.copy_(new[name])

    def run(
        self,
        state: HummingPrepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        """Without tokens nothing is called, as in both engines."""
        tokens = x.shape[0]
        step = MOST_MASKED if self.gemm_type == "grouped_masked" else max(1, tokens)
        for first in range(0, tokens, step):
            part = slice(first, first + step)
            self._layer(state, x[part], ids[part], weights[part], out[part], tactic)

    def permute(
        self, state: HummingPrepared, ids: torch.Tensor, tactic: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups, slots = state.problem.groups, ids.numel()
        if self.gemm_type == "grouped_masked":
            places, most, _ = self._grouped(state, ids)
            rows = ids.new_full((most + 1,), slots)
            rows[places.flatten().long()] = torch.arange(slots, dtype=ids.dtype, device=ids.device)
            experts = torch.arange(groups, dtype=ids.dtype, device=ids.device)
            return rows[:-1], experts.repeat_interleave(ids.shape[0])
        block = 1
        if self.gemm_type == "indexed":
            block = block_of(self._choose(state, ids, tactic).of13)
        made = sort_slots(ids, groups, block)
        used = torch.arange(len(made.rows), device=ids.device) < made.total
        rows = torch.where(used, made.rows, slots)
        return rows, made.experts.repeat_interleave(block).clamp(0, groups - 1)

    def gemm1(
        self, state: HummingPrepared, x: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        chosen = self._choose(state, ids, tactic)
        if self.gemm_type == "indexed":
            made = self._indexed(state, 13, x, ids, chosen)
            return made.view(*ids.shape, -1)
        places, rows, layout = self._grouped(state, ids)
        spread = _spread_masked(state.of13.config, x, places, rows)
        return gather_slots(self._product(state, 13, spread, ids, chosen, layout), places)

    def activate(self, state: HummingPrepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        flat = h13.reshape(-1, h13.shape[-1])
        done = _activate(state.of2.config, flat, state.problem.act, state.problem.n)
        return done.view(*h13.shape[:-1], -1)

    def gemm2(
        self, state: HummingPrepared, h: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        chosen = self._choose(state, ids, tactic)
        flat = h.reshape(-1, h.shape[-1])
        if self.gemm_type == "indexed":
            return self._indexed(state, 2, flat, ids, chosen).view(*ids.shape, -1)
        places, rows, layout = self._grouped(state, ids)
        spread = spread_rows(flat, places.reshape(-1, 1), rows)
        return gather_slots(self._product(state, 2, spread, ids, chosen, layout), places)

    def finalize(
        self,
        state: HummingPrepared,
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        out = y.new_empty(y.shape[0], y.shape[2])
        here = torch.where((ids >= 0) & (ids < state.problem.groups), 0, -1).int()
        flat = y.reshape(-1, y.shape[2])
        combine_rows(flat, here, weights, out, state.problem.scaling, in_order_of="slots")
        return out

    # One call

    def _layer(
        self,
        state: HummingPrepared,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        act, n, scaling = state.problem.act, state.problem.n, state.problem.scaling
        chosen = self._choose(state, ids, tactic)
        of2 = state.of2.config
        if self.gemm_type == "indexed":
            made = sort_slots(ids, state.problem.groups, block_of(chosen.of13))
            h13 = self._indexed(state, 13, x, ids, chosen, made)
            h = _activate(of2, h13, act, n)
            if block_of(chosen.of2) != block_of(chosen.of13):
                made = sort_slots(ids, state.problem.groups, block_of(chosen.of2))
            y = self._indexed(state, 2, h, ids, chosen, made)
            combine_rows(y, made.places, weights, out, scaling, in_order_of="slots")
            return
        places, rows, layout = self._grouped(state, ids)
        spread = _spread_masked(state.of13.config, x, places, rows)
        h13 = self._product(state, 13, spread, ids, chosen, layout)
        bound = (
            {"expert_tokens": layout}
            if self.gemm_type == "grouped_masked"
            else {"num_valid_tokens": layout[-1:]}
        )
        h = _activate(of2, h13, act, n, **bound)
        y = self._product(state, 2, h, ids, chosen, layout)
        combine_rows(y, places, weights, out, scaling)

    def _grouped(
        self, state: HummingPrepared, ids: torch.Tensor
    ) -> tuple[torch.Tensor, int, torch.Tensor]:
        """The row of each slot, how many rows there are, and the layout of the experts' rows."""
        groups = state.problem.groups
        if self.gemm_type == "grouped_masked":
            masked = mask_rows(ids, groups)
            return masked.places, groups * ids.shape[0], masked.counts
        made = sort_slots(ids, groups)
        return made.places, ids.numel(), made.offsets

    def _indexed(
        self,
        state: HummingPrepared,
        which: int,
        inputs: torch.Tensor,
        ids: torch.Tensor,
        chosen: Chosen,
        made: Any = None,
    ) -> torch.Tensor:
        """(slots, n) of tokens for w13, of slots for w2."""
        if made is None:
            schedule = chosen.of13 if which == 13 else chosen.of2
            made = sort_slots(ids, state.problem.groups, block_of(schedule))
        return self._forward(
            state,
            which,
            inputs,
            chosen,
            rows=ids.numel(),
            sorted_ids=made.rows,
            expert_ids=made.experts,
            num_tokens_padded=made.total,
            top_k=ids.shape[1] if which == 13 else 1,
            valid_shape_m=ids.numel(),
        )

    def _product(
        self,
        state: HummingPrepared,
        which: int,
        inputs: torch.Tensor,
        ids: torch.Tensor,
        chosen: Chosen,
        layout: torch.Tensor,
    ) -> torch.Tensor:
        """(rows, n) of rows that lie sorted."""
        return self._forward(
            state,
            which,
            inputs,
            chosen,
            rows=inputs.shape[0],
            expert_layout=layout,
            valid_shape_m=ids.numel(),
        )

    def _forward(
        self,
        state: HummingPrepared,
        which: int,
        inputs: torch.Tensor,
        chosen: Chosen,
        rows: int,
        **more: Any,
    ) -> torch.Tensor:
        first = which == 13
        stack = state.of13 if first else state.of2
        out = inputs.new_empty(rows, stack.n)
        library().humming_forward(
            stack.config,
            inputs=inputs,
            **(state.w13 if first else state.w2),
            outputs=out,
            locks=state.locks,
            compute_config=chosen.rule.compute,
            tuning_config=tuning_json(chosen.of13 if first else chosen.of2),
            **more,
        )
        return out

    def _rule(self, tactic: str, rows: int) -> tuple[int, HummingRule]:
        """The rows that a tactic names, or those given, and its rule. Raises ValueError."""
        if tactic == DEFAULT_TACTIC:
            return rows, HummingRule(self.gemm_type, invariant=False)
        named = _TACTIC.fullmatch(tactic)
        if named is None:
            raise ValueError(f"{tactic!r} is no tactic of {self.name}")
        return int(named[1]), HummingRule(self.gemm_type, invariant=named[2] is not None)

    def _choose(self, state: HummingPrepared, ids: torch.Tensor, tactic: str) -> Chosen:
        rows, rule = self._rule(tactic, candidate(ids.numel(), state.sm))
        return Chosen(
            rule, schedule_for(state.of13, rule, rows), schedule_for(state.of2, rule, rows)
        )


def _spread_masked(config: Any, x: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, k): each token's row at its places."""
    move = library().may_process_input
    # humming's own scatter leaves out places that are not below the number of slots, and masked
    # rows have such.
    if move is None or rows != places.numel():
        return spread_rows(x, places, rows)
    out, x = x.new_empty(rows, x.shape[1]), x.contiguous()
    done, _, _ = move(config, inputs=x, outputs=out, layout="scatter", scatter_idx=places)
    assert isinstance(done, torch.Tensor)
    return done


def _activate(
    config: Any, h13: torch.Tensor, gate: Gate, n: int, **bound: torch.Tensor
) -> torch.Tensor:
    """The activation of rows, as (rows, n); `bound` says which of them are used."""
    move = library().may_process_input
    if move is None:
        return activate_rows(h13, gate, n)
    if "expert_tokens" in bound:
        bound = {**bound, "layout": "grouped_mask"}  # type: ignore[dict-item]
    done, _, _ = move(
        config, inputs=h13, outputs=h13.new_empty(h13.shape[0], n), **expression(gate), **bound
    )
    assert isinstance(done, torch.Tensor)
    return done


def expression(gate: Gate) -> Mapping[str, str]:
    """An activation as humming's input kernel takes it: gates `a`, ups `b`, both float."""
    if not gate.gated:
        return {
            "activation_type": "unary",
            "activation_impl": "fmaxf(a, 0.f) * fmaxf(a, 0.f)",
        }
    limit = None if gate.limit is None else f"{float(gate.limit)}f"
    g = "a" if limit is None else f"fminf(a, {limit})"
    u = "b" if limit is None else f"fminf(fmaxf(b, -{limit}), {limit})"
    alpha, offset = f"{float(gate.alpha)}f", f"{float(gate.offset)}f"
    return {
        "activation_type": "binary_split",
        "activation_impl": f"({g}) / (1.f + expf(-{alpha} * ({g}))) * (({u}) + {offset})",
    }


def _prepare_stack(
    stack: Fp4Stack, bias: torch.Tensor | None, dtype: torch.dtype, config: Any = None
) -> dict[str, torch.Tensor]:
    """A matrix an expert in humming's layout, by the names that `humming_forward` has for it."""
    fmt, (groups, n, _) = stack.format, stack.codes.shape
    tensors = {"weight": stack.codes, "weight_scale": stack.scales}
    if fmt.has_global:
        tensors["weight_scale_2"] = stack.global_scale
    if bias is not None:
        tensors["bias"] = bias.to(dtype)
    _, plain = standard(fmt.name, tensors, dtype, groups)
    if config is None:
        index = stack.codes.device.index or 0
        k = 2 * stack.codes.shape[2]
        config = config_of(fmt.name, dtype, (n, k), index, groups, bias is not None)
    ready = library().transform_humming_tensors(config, plain)
    return {name: tensor.clone() for name, tensor in ready.items()}


def _smallest(format_: str, device: torch.device) -> Fp4Stack:
    """The smallest matrices of a format that need no padding, all zero."""
    fmt, groups = FORMATS[format_], 2

    def empty(columns: int) -> torch.Tensor:
        return torch.zeros(groups, PAD_N, columns, dtype=torch.uint8, device=device)

    one = torch.ones(groups, device=device)
    return Fp4Stack(fmt, empty(PAD_K // 2), empty(PAD_K // fmt.block), one)


def backends() -> tuple[HummingExperts, ...]:
    """One for each gemm type."""
    return (
        HummingExperts("humming-indexed", "indexed"),
        HummingExperts("humming-grouped", "grouped_contiguous"),
        HummingExperts("humming-masked", "grouped_masked"),
    )
