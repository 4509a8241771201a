"""The grouped GEMMs of the package `triton_kernels` (MXFP4 x bf16 on Hopper), as engines call them.

* ``vllm-ogs``: vLLM's vendored `matmul_ogs` with its fused SwiGLU (``--moe-backend triton``, the
  default of gpt-oss on SM90); gates and ups lie in turn
* ``vllm-ogs-unfused``: the same with an activation of its own (``triton_unfused``)
* ``triton-kernels``: `matmul` of the installed package, as SGLang calls it (``triton_kernel``):
  with fused SwiGLU where the activation is gpt-oss's, which is the only one it has

The scales of a Hopper weight are read unmasked past k (triton 10772), so both engines pad them when
they load: vLLM to a multiple of 4 blocks with zeros, SGLang to one of 128 elements with ones. A
subclass with `scale_multiple` 1 does not. In both, an intermediate size is padded to a
multiple of 64.

Sorted slots are made by `slots` and handed over as the library's own routing data: its routing
kernels, which start from a router's logits, are not run. Slots that are elsewhere are in no
expert's rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..grouped.problem import ExpertsProblem
from ..grouped.slots import (
    SortedSlots,
    activate_rows,
    combine_rows,
    compile_slots,
    gather_slots,
    run_top_ks,
    sort_slots,
    spread_rows,
)
from ..grouped.tensors import ExpertWeights, zero_experts
from ..problem import MXFP4, Device
from . import DEFAULT_TACTIC
from . import _triton_kernels as package

FUSED_GATE = "swiglu-oai"
"""The activation that the library fuses."""


@dataclass(frozen=True, slots=True)
class HopperExperts:
    """Experts in the library's Hopper layouts: its tensors with their precision, and biases
    float32 with as many rows."""

    problem: ExpertsProblem
    w13: Any
    w2: Any
    precision13: Any
    precision2: Any
    b13: torch.Tensor | None
    b2: torch.Tensor | None


_STAGED = 128
"""The largest m whose stages are called one by one: what ``pdl-raw`` has of them."""
_CUT = 24
"""The m that they are graded at, whatever the ranges."""


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """Sorted slots as the library takes them: what `_matmul` needs besides operands.

    gammas  (slots,): the router's weight of each row
    """

    made: SortedSlots
    data: Any
    gammas: torch.Tensor | None


class _TritonKernels(ABC):
    """What both interfaces share; every stage by itself, but the finalizing that is in gemm2."""

    experts = True
    fused = False
    """Whether the activation is in gemm1."""
    scale_multiple = 4
    """Blocks that scales are padded to a multiple of."""
    pad_scale = 0
    """Byte that they are padded with."""
    uses: tuple[str, ...] = ("sort",)
    """What every call calls of `slots`."""

    def build(self, problems: Sequence[ExpertsProblem], device: Device, workers: int) -> None:
        """Compile what calls of up to these numbers of tokens need, by calling with one m of each
        variant. Tokens of families with another number of experts are run at these m only."""
        given: dict[ExpertsProblem, list[int]] = {}
        for problem in problems:
            given.setdefault(problem.at(0), []).append(problem.m)
        for problem, ms in given.items():
            state = self.prepare(zero_experts(problem, device.torch), problem)
            for top_k in run_top_ks(problem):
                odd = replace(problem, top_k=top_k)
                for m in self.called_to_build(odd, ms, top_k == problem.top_k):
                    self._call(state, odd, m, device.torch)
            compile_slots(problem, max(ms), device.torch, self.uses)
        if device.kind == "cuda":
            torch.cuda.synchronize(device.torch)

    def called_to_build(self, problem: ExpertsProblem, ms: Sequence[int], every: bool) -> list[int]:
        """One m of each variant that calls of these numbers of tokens have; with `every`, those of
        fewer have, too, and stages."""
        among = sorted({*range(1, max(ms) + 1), _CUT}) if every else sorted(m for m in ms if m > 0)
        return package.one_of_each(among, lambda m: self._variant(problem, m))

    def _call(
        self, state: HopperExperts, problem: ExpertsProblem, m: int, device: torch.device
    ) -> None:
        """One call with the problem's experts a token; and where these are the layer's own, each
        stage by itself at a small m, since they are graded so."""
        x = torch.zeros(m, problem.k, dtype=problem.dtype, device=device)
        slots = torch.arange(m * problem.top_k, device=device, dtype=torch.int32)
        ids = (slots % problem.groups).view(m, problem.top_k)
        router = torch.ones(m, problem.top_k, device=device)
        self.run(state, x, ids, router, torch.empty_like(x), DEFAULT_TACTIC)
        if m <= _STAGED and problem.top_k == state.problem.top_k:
            h = x.new_zeros(m, problem.top_k, problem.n)
            if callable(self.gemm1):  # where it can be cut there
                h = self.activate(state, self.gemm1(state, x, ids, DEFAULT_TACTIC), DEFAULT_TACTIC)
            self.gemm2(state, h, ids, DEFAULT_TACTIC)

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> HopperExperts:
        fused = self._fuses(problem)
        first = package.padded13(weights.w13, problem, interleaved=fused)
        second = package.padded2(weights.w2, problem)
        w13, precision13 = self._matrix(first)
        w2, precision2 = self._matrix(second)
        b13 = None if weights.b13 is None else package.rows13(weights.b13, problem, fused)
        b2 = None if weights.b2 is None else weights.b2.clone()
        return HopperExperts(problem, w13, w2, precision13, precision2, b13, b2)

    def update(self, state: HopperExperts, weights: ExpertWeights, problem: ExpertsProblem) -> None:
        """Give prepared experts new values in place."""
        made = self.prepare(weights, problem)
        for mine, new in zip(self._tensors(state), self._tensors(made), strict=True):
            mine.copy_(new)

    def _tensors(self, state: HopperExperts) -> list[torch.Tensor]:
        held = [
            each.storage.data
            for each in (
                state.w13,
                state.w2,
                self._scale(state.precision13),
                self._scale(state.precision2),
            )
        ]
        return held + [b for b in (state.b13, state.b2) if b is not None]

    def permute(
        self, state: HopperExperts, ids: torch.Tensor, tactic: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = state.problem.groups
        made = sort_slots(ids, groups)
        used = torch.arange(len(made.rows), device=ids.device) < made.total
        return torch.where(used, made.rows, ids.numel()), made.experts.clamp(0, groups - 1)

    def gemm1(
        self, state: HopperExperts, x: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        routed = self._route(state, ids, None)
        rows = self._first(state, x, routed)
        h13 = gather_slots(rows, routed.made.places)
        return h13.unflatten(2, (-1, package.padded_size(state.problem.n)))[
            ..., : state.problem.n
        ].flatten(2)

    def activate(self, state: HopperExperts, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        return activate_rows(h13.contiguous(), state.problem.act, state.problem.n)

    def gemm2(
        self, state: HopperExperts, h: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        routed = self._route(state, ids, None)
        n = state.problem.n
        wide = torch.nn.functional.pad(h.reshape(-1, n), (0, package.padded_size(n) - n))
        rows = spread_rows(wide, routed.made.places.reshape(-1, 1), ids.numel())
        return gather_slots(self._second(state, rows, routed), routed.made.places)

    def run(
        self,
        state: HopperExperts,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        """Without tokens nothing is called, as in both engines."""
        if not x.shape[0]:
            return
        routed = self._route(state, ids, weights)
        h = self._first(state, x, routed)
        if not self._fuses(state.problem):
            h = activate_rows(h, state.problem.act, package.padded_size(state.problem.n))
        self._finish(state, h, routed, out)

    def _fuses(self, problem: ExpertsProblem) -> bool:
        return self.fused and problem.gate == FUSED_GATE

    def _sorted_weights(
        self, state: HopperExperts, made: SortedSlots, weights: torch.Tensor
    ) -> torch.Tensor:
        """The router's weight of each row, with the routed scaling; any in rows without a slot."""
        rows = made.rows.long().clamp(0, weights.numel() - 1)
        return weights.flatten()[rows] * state.problem.scaling

    # What the interfaces differ in

    @abstractmethod
    def _variant(self, problem: ExpertsProblem, m: int) -> Hashable:
        """What the library's kernels are compiled for in a call of m tokens."""

    @abstractmethod
    def _matrix(self, stack: package.PaddedStack) -> tuple[Any, Any]:
        """(the experts' values as the library holds them, its precision config with scales)."""

    @abstractmethod
    def _scale(self, precision: Any) -> Any:
        """The scales in a precision config."""

    @abstractmethod
    def _route(
        self, state: HopperExperts, ids: torch.Tensor, weights: torch.Tensor | None
    ) -> RoutedRows:
        """Slots in sorted order, and what the library's GEMMs are told of them."""

    @abstractmethod
    def _first(self, state: HopperExperts, x: torch.Tensor, routed: RoutedRows) -> torch.Tensor:
        """gemm1 of tokens, and the activation where it is fused: rows in sorted order."""

    @abstractmethod
    def _second(self, state: HopperExperts, h: torch.Tensor, routed: RoutedRows) -> torch.Tensor:
        """gemm2 of rows in sorted order, without the router's weights."""

    @abstractmethod
    def _finish(
        self, state: HopperExperts, h: torch.Tensor, routed: RoutedRows, out: torch.Tensor
    ) -> None:
        """gemm2 and finalize."""


class VllmOgsUnfused(_TritonKernels):
    """vLLM's `matmul_ogs` with an activation between."""

    name = "vllm-ogs-unfused"
    layout = "hopper-mx"
    distributions = ("vllm", "triton")

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if reason := package.unsupported(problem, device):
            return reason
        if package.vendored() is None:
            return "vLLM's copy of triton_kernels is not installed (pip install vllm)"
        return None

    def files(self) -> Sequence[Path]:
        return ()

    def _variant(self, problem: ExpertsProblem, m: int) -> Hashable:
        return package.ogs_variant(problem, m)

    def _matrix(self, stack: package.PaddedStack) -> tuple[Any, Any]:
        api = package.ogs()
        scales = package.scale_padding(stack.scales, self.scale_multiple, self.pad_scale)
        values = package.values_in(api, stack.codes, axis=1, as_instance=False)
        scale = package.scales_in(api, scales, axis=1, as_instance=False)
        return values, api.PrecisionConfig(weight_scale=scale)

    def _scale(self, precision: Any) -> Any:
        return precision.weight_scale

    def _route(
        self, state: HopperExperts, ids: torch.Tensor, weights: torch.Tensor | None
    ) -> RoutedRows:
        api, groups = package.ogs(), state.problem.groups
        made = sort_slots(ids, groups)
        gammas = None
        if weights is not None:
            # vLLM rounds them to bf16.
            gammas = self._sorted_weights(state, made, weights).bfloat16()
        blocks = api.compute_expt_data(made.counts, groups, ids.numel())
        data = api.RoutingData(gammas, made.counts, groups, ids.shape[1], blocks)
        return RoutedRows(made, data, gammas)

    def _first(self, state: HopperExperts, x: torch.Tensor, routed: RoutedRows) -> torch.Tensor:
        api, made = package.ogs(), routed.made
        activation = None
        if self._fuses(state.problem):
            act = state.problem.act
            specs = api.FnSpecs("swiglu", api.swiglu_fn, ("alpha", "limit"))
            activation = api.FusedActivation(specs, (act.alpha, act.limit), 2)
        found = api.matmul(
            x,
            state.w13,
            state.b13,
            routed.data,
            gather_indx=api.GatherIndx(src_indx=made.rows, dst_indx=made.places.flatten()),
            precision_config=state.precision13,
            fused_activation=activation,
        )
        assert isinstance(found, torch.Tensor)
        return found.view(made.places.numel(), -1)

    def _second(self, state: HopperExperts, h: torch.Tensor, routed: RoutedRows) -> torch.Tensor:
        found = package.ogs().matmul(
            h, state.w2, state.b2, routed.data, precision_config=state.precision2
        )
        assert isinstance(found, torch.Tensor)
        return found.view(h.shape[0], -1)

    def _finish(
        self, state: HopperExperts, h: torch.Tensor, routed: RoutedRows, out: torch.Tensor
    ) -> None:
        api, made = package.ogs(), routed.made
        api.matmul(
            h,
            state.w2,
            state.b2,
            routed.data,
            scatter_indx=api.ScatterIndx(src_indx=made.places.flatten(), dst_indx=made.rows),
            precision_config=state.precision2,
            gammas=routed.gammas,
            y=out.unsqueeze(0),
        )


class VllmOgs(VllmOgsUnfused):
    """vLLM's `matmul_ogs`, gemm1 and the activation in one."""

    name = "vllm-ogs"
    layout = "hopper-mx-interleaved"
    fused = True
    gemm1 = activate = None  # type: ignore[assignment]

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if problem.gate != FUSED_GATE:
            return f"vLLM fuses {FUSED_GATE} alone, and this is {problem.gate}"
        return super().unsupported(problem, device)


class TritonKernels(_TritonKernels):
    """The installed package's `matmul`; finalized outside, in the order of slots."""

    name = "triton-kernels"
    layout = "hopper-mx-ragged"
    distributions = ("tokenspeed-triton-kernels", "triton")
    fused = True
    pad_scale = 127
    uses = ("sort", "slots")

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if reason := package.unsupported(problem, device):
            return reason
        if package.packaged() is None:
            return "triton_kernels is not installed (pip install tokenspeed-triton-kernels)"
        return None

    def files(self) -> Sequence[Path]:
        return ()

    def gemm1(
        self, state: HopperExperts, x: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        """Where the activation is fused, with gates and ups taken apart again."""
        if not self._fuses(state.problem):
            return super().gemm1(state, x, ids, tactic)
        routed = self._route(state, ids, None)
        rows = self._product(x, state.w13, state.b13, routed, state.precision13, gather=True)
        pairs = gather_slots(rows, routed.made.places).unflatten(2, (-1, 2))
        return pairs[..., : state.problem.n, :].transpose(2, 3).flatten(2)

    def _variant(self, problem: ExpertsProblem, m: int) -> Hashable:
        return package.ragged_variant(problem, m)

    def _matrix(self, stack: package.PaddedStack) -> tuple[Any, Any]:
        api = package.ragged()
        scales = package.scale_padding(stack.scales, self.scale_multiple, self.pad_scale)
        values = package.values_in(api, stack.codes, axis=-2, as_instance=True)
        scale = package.scales_in(api, scales, axis=-2, as_instance=True)
        return values, api.PrecisionConfig(b_mx_scale=scale, b_microblock_size=MXFP4.block)

    def _scale(self, precision: Any) -> Any:
        return precision.b_mx_scale

    def _route(
        self, state: HopperExperts, ids: torch.Tensor, weights: torch.Tensor | None
    ) -> RoutedRows:
        made = sort_slots(ids, state.problem.groups)
        gammas = None if weights is None else self._sorted_weights(state, made, weights)
        data = package.ragged().make_ragged_tensor_metadata(made.counts, ids.numel())
        return RoutedRows(made, data, gammas)

    def _first(self, state: HopperExperts, x: torch.Tensor, routed: RoutedRows) -> torch.Tensor:
        api, activation = package.ragged(), None
        if self._fuses(state.problem):
            act = state.problem.act
            specs = api.FnSpecs("swiglu", api.swiglu_fn, ("alpha", "limit"), reduction_n=2)
            activation = api.FusedActivation(specs, (act.alpha, act.limit))
        return self._product(
            x,
            state.w13,
            state.b13,
            routed,
            state.precision13,
            gather=True,
            fused_activation=activation,
        )

    def _second(self, state: HopperExperts, h: torch.Tensor, routed: RoutedRows) -> torch.Tensor:
        return self._product(h, state.w2, state.b2, routed, state.precision2)

    def _finish(
        self, state: HopperExperts, h: torch.Tensor, routed: RoutedRows, out: torch.Tensor
    ) -> None:
        places = routed.made.places
        y = self._product(
            h,
            state.w2,
            state.b2,
            routed,
            state.precision2,
            gammas=routed.gammas,
            scatter_indx=routed.made.rows,
        )
        ones = torch.ones(places.shape, dtype=torch.float32, device=out.device)
        combine_rows(y, places, ones, out, 1.0, in_order_of="slots")

    def _product(
        self,
        rows: torch.Tensor,
        matrices: Any,
        bias: torch.Tensor | None,
        routed: RoutedRows,
        precision: Any,
        gather: bool = False,
        **more: Any,
    ) -> torch.Tensor:
        """(slots, n) in sorted order, or where `scatter_indx` says."""
        if gather:
            top_k, slots = routed.made.places.shape[1], routed.made.places.numel()
            # Rows behind the last expert's are read by no block.
            more["gather_indx"] = routed.made.rows.clamp(0, slots - 1) // top_k
        found = package.ragged().matmul(
            rows,
            matrices,
            bias,
            a_ragged_metadata=routed.data,
            precision_config=precision,
            **more,
        )
        assert isinstance(found, torch.Tensor)
        return found.view(routed.made.places.numel(), -1)


def backends() -> tuple[_TritonKernels, ...]:
    """All that come with fp4tune."""
    return VllmOgs(), VllmOgsUnfused(), TritonKernels()
