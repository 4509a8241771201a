"""FlashInfer's `cutlass_fused_moe` on SM90: MXFP4 experts on bf16 tokens.

Written from FlashInfer's documentation and source (0.6.12 and 0.7.4) and from how SGLang calls it.
One call is the whole layer: it permutes, multiplies, activates, multiplies and sums, and can be cut
nowhere.

* A tactic is a kernel for each of the two GEMMs, ``gemm1=I,gemm2=J``, in FlashInfer's numbers; each
  kernel that FlashInfer says fits is in one pair at least. ``default`` is a plain call: what
  FlashInfer's autotuner has stored, and otherwise the first of each. Since 0.7 a call takes these
  numbers; before, they are given where it asks the autotuner.
* ``use_fused_finalize`` changes nothing here: kernels with FP4 weights on SM90 have no epilogue
  that adds up a token's experts, in neither version, so their finalize is always a kernel of its
  own, in a fixed order.
* Each call has a workspace of its own from torch's allocator, as SGLang's do: none is shared
  between streams.
* Sizes that are no multiple of 128 are padded as SGLang pads them; a hidden size then costs a copy
  of the tokens and one of the result, a call.
* The routed scaling is the router's: what is not 1 is multiplied into its weights first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ...grouped.problem import ExpertsProblem, Gate
from ...grouped.tensors import ExpertWeights, Fp4Stack
from ...problem import FORMATS, Device
from .. import DEFAULT_TACTIC
from . import experts_build
from ._support import Unavailable, version
from ._tuner import InterruptedCall, interrupted, pinned

STEP = 128
"""What hidden and intermediate sizes are padded to."""
SM = 90
_TACTIC = re.compile(r"gemm1=(\d+),gemm2=(\d+)")
_OPERATIONS = ("trtllm::fused_moe::gemm1", "trtllm::fused_moe::gemm2")
_SMALLEST = 8
"""Tokens of a call that is made to see what it would launch."""
_loading = threading.Lock()
_loaded: dict[str, Path] = {}


@dataclass(frozen=True, slots=True)
class CutlassExpertWeights:
    """The experts as FlashInfer takes them; `hidden` is the size the weights are padded to.

    fc1, fc2   uint8 (experts, rows, k/2), interleaved; rows of fc1 are up, then gate
    scales     of both, folded as the version at hand has it
    b1, b2     bf16 (experts, rows); None without biases
    gate       what `cutlass_fused_moe` is told of the activation
    """

    problem: ExpertsProblem
    hidden: int
    fc1: torch.Tensor
    fc2: torch.Tensor
    scales: list[torch.Tensor]
    b1: torch.Tensor | None
    b2: torch.Tensor | None
    gate: dict[str, Any]


@functools.cache
def _moe() -> Any:
    """`flashinfer.fused_moe`, or the `Unavailable` that says why not."""
    if importlib.util.find_spec("flashinfer") is None:
        return Unavailable("FlashInfer is not installed")
    try:
        module = importlib.import_module("flashinfer.fused_moe")
        for name in ("weights", "scales"):
            getattr(module, f"interleave_moe_{name}_for_sm90_mixed_gemm")
    except AttributeError as error:
        return Unavailable(f"this FlashInfer is too old: it has no {error.name}")
    except Exception as error:  # whatever its own dependencies raise
        return Unavailable(f"importing FlashInfer failed ({type(error).__name__}: {error})")
    return module


def fused_moe() -> Any:
    """FlashInfer's module. Raises Unavailable, one sentence."""
    found = _moe()
    if isinstance(found, Unavailable):
        raise Unavailable(*found.args)
    return found


@functools.cache
def _takes_tactics() -> bool:
    """Whether `cutlass_fused_moe` takes the numbers of its kernels (since 0.7)."""
    return (
        "profile_ids"
        in importlib.import_module("inspect").signature(fused_moe().cutlass_fused_moe).parameters
    )


def activation_of(gate: Gate, experts: int, device: torch.device | str) -> dict[str, Any]:
    """What `cutlass_fused_moe` is told of what is between the GEMMs.

    Alpha, offset and limit are one number an expert; a plain SwiGLU has none of them.
    """
    kinds = importlib.import_module("flashinfer.tllm_enums").ActivationType
    if not gate.gated:
        return {"activation_type": kinds.Relu2}
    plain = gate.limit is None and gate.offset == 0 and gate.alpha == 1
    if plain:
        return {"activation_type": kinds.Swiglu}
    numbers = {"alpha": gate.alpha, "beta": gate.offset, "limit": gate.limit}
    each = {
        f"swiglu_{name}": torch.full((experts,), number, dtype=torch.float32, device=device)
        for name, number in numbers.items()
        if number is not None
    }
    return {"activation_type": kinds.Swiglu, **each}


def up_first(rows: torch.Tensor, gated: bool) -> torch.Tensor:
    """(experts, gate rows and then up rows, ...) with up rows in front; others as they are."""
    if not gated:
        return rows
    n = rows.shape[1] // 2
    return torch.cat((rows[:, n:], rows[:, :n]), dim=1)


def padded_rows(rows: torch.Tensor, size: int, parts: int = 1) -> torch.Tensor:
    """(experts, rows, ...) with each of `parts` equal parts of the rows grown to `size` by zeros.

    The same tensor where nothing is missing.
    """
    each = rows.shape[1] // parts
    if each == size:
        return rows
    grown = rows.new_zeros(rows.shape[0], parts, size, *rows.shape[2:])
    grown[:, :, :each] = rows.view(rows.shape[0], parts, each, *rows.shape[2:])
    return grown.flatten(1, 2)


def padded_columns(rows: torch.Tensor, size: int) -> torch.Tensor:
    """(experts, rows, columns) grown to `size` columns by zeros."""
    missing = size - rows.shape[2]
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def _up(size: int) -> int:
    return -(-size // STEP) * STEP


class CutlassExperts:
    """See the module's docstring."""

    experts = True
    name = "flashinfer-cutlass-experts"
    layout = "flashinfer-sm90-mixed"
    distributions = ("flashinfer-python", "flashinfer-jit-cache")

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        if device.sm != SM:
            return f"{self.name} runs on SM {SM}, not on SM {device.sm}"
        if problem.format != "mxfp4":
            return f"{self.name} computes mxfp4 only, not {problem.format}"
        try:
            fused_moe()
            if experts_build.library() is None and (why := experts_build.missing()):
                return f"{self.name} is not built for FlashInfer {version()}, and {why}"
        except Unavailable as error:
            return str(error)
        return None

    def build(self, problems: Sequence[ExpertsProblem], device: Device, workers: int) -> None:
        """Compile the kernels where no library is there, and load it."""
        experts_build.build(workers)
        _take_library()

    def files(self) -> list[Path]:
        """The library that holds the kernels, once there is one."""
        found = _loaded.get(version()) or experts_build.library()
        return [found] if found else []

    def tactics(self, problem: ExpertsProblem, device: Device) -> Sequence[str]:
        """The default, then pairs in which each kernel that fits stands once at least (on a
        GPU)."""
        if device.kind != "cuda" or not torch.cuda.is_available():
            return (DEFAULT_TACTIC,)
        seen = self._seen(problem, device)
        if seen is None:
            return (DEFAULT_TACTIC,)
        try:
            return [DEFAULT_TACTIC, *pairs(*(_valid(seen, stage) for stage in (1, 2)))]
        except ValueError:  # without its sources nobody says which numbers a library holds
            return (DEFAULT_TACTIC,)

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> CutlassExpertWeights:
        module, act = fused_moe(), problem.act
        _take_library()
        hidden, inner = _up(problem.k), _up(problem.n)
        parts = 2 if act.gated else 1

        def laid(stack: Fp4Stack, rows: int, columns: int, parts: int) -> list[torch.Tensor]:
            """The codes and the scales of one matrix an expert, padded."""
            return [
                padded_columns(
                    padded_rows(up_first(t, parts == 2), rows, parts),
                    columns // per,
                ).contiguous()
                for t, per in ((stack.codes, 2), (stack.scales, stack.format.block))
            ]

        first, second = laid(weights.w13, inner, hidden, parts), laid(weights.w2, hidden, inner, 1)
        fc1, fc2 = (
            module.interleave_moe_weights_for_sm90_mixed_gemm(c[0], "fp4") for c in (first, second)
        )
        scales = [
            module.interleave_moe_scales_for_sm90_mixed_gemm(s[1], group_size=weights.format.block)
            for s in (first, second)
        ]
        b1, b2 = weights.b13, weights.b2
        if b1 is not None:
            b1 = padded_rows(up_first(b1, act.gated), inner, parts).to(problem.dtype).contiguous()
        if b2 is not None:
            b2 = padded_rows(b2, hidden).to(problem.dtype).contiguous()
        gate = activation_of(act, weights.groups, weights.codes.device)
        return CutlassExpertWeights(problem, hidden, fc1, fc2, scales, b1, b2, gate)

    def run(
        self,
        state: CutlassExpertWeights,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        if not x.shape[0]:
            return
        missing = state.hidden - x.shape[1]
        given = torch.nn.functional.pad(x, (0, missing)) if missing else x
        made = out.new_empty(x.shape[0], state.hidden) if missing else out
        scaling = state.problem.scaling
        router = weights if scaling == 1 else weights * scaling
        call = _experts_call(state, given, ids, router, made)
        numbers = parse(tactic)
        if numbers is None:
            where: Any = nullcontext()
        elif _takes_tactics():
            where, call["profile_ids"] = nullcontext(), list(numbers)
        else:
            where = pinned(dict(zip(_OPERATIONS, numbers, strict=True)))
        with where:
            fused_moe().cutlass_fused_moe(**call)
        if missing:
            out.copy_(made[:, : x.shape[1]])

    def _seen(self, problem: ExpertsProblem, device: Device) -> InterruptedCall | None:
        """The runner of the problem's GEMMs, on two experts of zeros."""
        _take_library()
        p = problem
        hidden, inner, parts = _up(p.k), _up(p.n), 2 if p.act.gated else 1
        block = FORMATS[p.format].block

        def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device.torch)

        state = CutlassExpertWeights(
            p,
            hidden,
            zeros(2, parts * inner, hidden // 2),
            zeros(2, hidden, inner // 2),
            [zeros(2, parts * inner, hidden // block), zeros(2, hidden, inner // block)],
            None,
            None,
            activation_of(p.act, 2, device.torch),
        )
        x = zeros(_SMALLEST, hidden, dtype=p.dtype)
        ids = zeros(_SMALLEST, 1, dtype=torch.int32)
        router = zeros(_SMALLEST, 1, dtype=torch.float32)
        call = _experts_call(state, x, ids, router, torch.empty_like(x))
        return interrupted(fused_moe().cutlass_fused_moe, call)


def _experts_call(
    state: CutlassExpertWeights,
    x: torch.Tensor,
    ids: torch.Tensor,
    router: torch.Tensor,
    out: torch.Tensor,
) -> dict[str, Any]:
    """The arguments of `cutlass_fused_moe`, as 0.6.12 knows them too."""
    return {
        "input": x,
        "token_selected_experts": ids,
        "token_final_scales": router,
        "fc1_expert_weights": state.fc1,
        "fc2_expert_weights": state.fc2,
        "output_dtype": out.dtype,
        "quant_scales": [s.view(torch.int32) for s in state.scales],
        "fc1_expert_biases": state.b1,
        "fc2_expert_biases": state.b2,
        "output": out,
        "use_w4_group_scaling": True,
        **state.gate,
    }


@functools.lru_cache(maxsize=4096)
def parse(tactic: str) -> tuple[int, int] | None:
    """FlashInfer's numbers of a tactic, None of the default. Raises ValueError for one that
    `CutlassExperts.tactics` did not write."""
    if tactic == DEFAULT_TACTIC:
        return None
    found = _TACTIC.fullmatch(tactic)
    if found is None:
        raise ValueError(f"{tactic!r} is no pair of FlashInfer's kernels")
    return int(found[1]), int(found[2])


def pairs(first: Sequence[int], second: Sequence[int]) -> list[str]:
    """As few pairs as have each number of both once at least, in order."""
    if not first or not second:
        return []
    count = max(len(first), len(second))
    return [f"gemm1={first[i % len(first)]},gemm2={second[i % len(second)]}" for i in range(count)]


def _valid(seen: InterruptedCall, stage: int) -> list[int]:
    """FlashInfer's numbers of the kernels that fit one of the GEMMs, and are there."""
    seen.runner.gemm_idx_for_tuning = stage
    shapes = [tuple(i.shape) if isinstance(i, torch.Tensor) else () for i in seen.inputs]
    profile = SimpleNamespace(get_opt_shapes=lambda: shapes)
    valid = [int(t) for t in seen.runner.get_valid_tactics(seen.inputs, profile) if int(t) >= 0]
    path = experts_build.library()
    here = experts_build.held(path) if path else None
    if here is None:
        return valid
    every = experts_build.numbered(experts_build.heuristic())
    return [t for t in valid if every[t % len(every)] in here]


def _take_library() -> None:
    """Have FlashInfer take the library that `experts_build.library` finds.

    FlashInfer would build the whole module; it is handed the library once, and keeps it.
    """
    with _loading:
        if version() in _loaded:
            return
        path = experts_build.library()
        if path is None:
            raise Unavailable(f"{CutlassExperts.name} is not built for FlashInfer {version()}")
        core: Any = importlib.import_module("flashinfer.fused_moe.core")
        ffi = importlib.import_module("tvm_ffi")
        original = core.gen_cutlass_fused_moe_sm90_module
        core.gen_cutlass_fused_moe_sm90_module = lambda *_: SimpleNamespace(
            build_and_load=lambda: ffi.load_module(str(path))
        )
        try:
            core.get_cutlass_fused_moe_module(str(SM))
        finally:
            core.gen_cutlass_fused_moe_sm90_module = original
        _loaded[version()] = path
