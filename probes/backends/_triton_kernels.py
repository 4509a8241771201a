"""The package `triton_kernels`, in vLLM's vendored copy or installed by itself: what is there, and
experts' weights in its Hopper layouts.

vLLM 0.33 vendors the interface of Triton 3.5.1 (`matmul_ogs`); tokenspeed-triton-kernels brings
that of 3.8 (`matmul`), which SGLang 0.5.23 calls too. Both import each other's modules by the
name of the package, so one process holds one of them. Neither needs its engine to be imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..grouped.problem import ExpertsProblem
from ..grouped.tensors import Fp4Stack
from ..problem import Device

PACKAGE = "triton_kernels"
WARPS = 8
"""Warps that scales are laid out for, as both engines have it."""
ALIGNMENT = 64
"""What both engines pad an intermediate size to a multiple of."""
_RAGGED_FEW = 64
"""Slots an expert up to which the 3.8 interface doubles its tile."""
_BEHIND = 1 << 12
"""Bytes of NaN behind a scale tensor."""
_NAN = 0xFF


def vendored() -> Path | None:
    """vLLM's copy, without importing vLLM; None where there is none."""
    return _with(
        "matmul_ogs.py", *(Path(p, "third_party", PACKAGE) for p in _package_places("vllm"))
    )


def packaged() -> Path | None:
    """The installed package with the newer interface; None where there is none."""
    return _with("matmul.py", *(Path(p) for p in _package_places(PACKAGE)))


def _package_places(name: str) -> list[str]:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    return list(found.submodule_search_locations or ()) if found else []


def _with(file: str, *folders: Path) -> Path | None:
    return next((folder for folder in folders if (folder / file).is_file()), None)


def unsupported(problem: ExpertsProblem, device: Device) -> str | None:
    """What holds of both interfaces: one sentence, or None."""
    if device.kind != "cuda" or device.sm is None:
        return "triton_kernels runs on CUDA GPUs only"
    if device.sm != 90:
        return f"triton_kernels is called with its Hopper layouts here, and this is SM{device.sm}"
    if problem.format != "mxfp4":
        return f"triton_kernels takes mxfp4 weights, not {problem.format}"
    if not problem.act.gated:
        return f"both engines call triton_kernels for gates only, and {problem.gate} has none"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


@functools.cache
def _package_loaded(folder: Path) -> None:
    """Have the package in this folder be the one that is imported. Raises RuntimeError where this
    process has another."""
    there = sys.modules.get(PACKAGE)
    if there is not None:
        at = [Path(p).resolve() for p in getattr(there, "__path__", ())]
        if folder.resolve() not in at:
            raise RuntimeError(f"this process has imported another {PACKAGE}, from {at}")
        return
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None  # true of every .py path
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[PACKAGE]
        raise


# What is compiled for
#
# Both libraries compile a GEMM for its tile, and Triton for whether each integer that is passed is
# 1, a multiple of 16, or too large for 32 bits. On Hopper, MXFP4 is never multiplied by the
# persistent kernel, so tiles depend on no other number of blocks.


def ogs_variant(problem: ExpertsProblem, m: int) -> Hashable:
    """What the 3.5.1 interface has its kernels compiled for in a call of m tokens: two of one value
    compile the same. The number of experts a token has is one of its constants."""
    slots = m * problem.top_k
    block = _power_of_two(max(1, slots // problem.groups), 128)
    passed = (m, slots, _grid_rows(slots, problem.groups, block))
    return problem.top_k, block, *map(_int_kind, passed), *_size_kinds(problem, m)


def ragged_variant(problem: ExpertsProblem, m: int) -> Hashable:
    """The same of the 3.8 interface, which is told slots only, and doubles the tile of few."""
    slots = m * problem.top_k
    each = max(1, slots // problem.groups)
    block = _power_of_two(2 * each, 64) if each <= _RAGGED_FEW else _power_of_two(each, 128)
    passed = (slots, _grid_rows(slots, problem.groups, block))
    return block, *map(_int_kind, passed), *_size_kinds(problem, m)


def one_of_each(ms: Iterable[int], variant: Callable[[int], Hashable]) -> list[int]:
    """The first m of each variant, ascending."""
    firsts: dict[Hashable, int] = {}
    for m in ms:
        firsts.setdefault(variant(m), m)
    return sorted(firsts.values())


def _power_of_two(rows: int, most: int) -> int:
    """The rows of a tile that so many fit into, from 16 to `most`."""
    return max(16, min(1 << (rows - 1).bit_length(), most))


def _grid_rows(slots: int, groups: int, block: int) -> int:
    """The most blocks that so many slots can be in."""
    return slots if slots <= groups else -(-(slots - groups + 1) // block) + groups - 1


def _int_kind(value: int) -> tuple[bool, bool]:
    """What Triton compiles an integer for."""
    return value == 1, value % 16 == 0


def _size_kinds(problem: ExpertsProblem, m: int) -> tuple[int, ...]:
    """Of each matrix that has a row a token or slot: whether its size, which is passed as a stride,
    needs 64 bits, and whether its offsets do."""
    n, slots = padded_size(problem.n), m * problem.top_k
    sizes = (m * problem.k, slots * problem.k, slots * n, slots * 2 * n)
    return tuple((size >= 1 << 31) + (size > 1 << 31) for size in sizes)


@functools.cache
def ogs() -> Any:
    """The names of the 3.5.1 interface that are used here."""
    folder = vendored()
    assert folder is not None
    _package_loaded(folder)
    main = importlib.import_module(f"{PACKAGE}.matmul_ogs")
    routing = importlib.import_module(f"{PACKAGE}.routing")
    flags = importlib.import_module(f"{PACKAGE}.matmul_ogs_details.opt_flags")
    flags.update_opt_flags_constraints({"split_k": 1})  # as vLLM does on SM90
    return SimpleNamespace(
        matmul=main.matmul_ogs,
        FusedActivation=main.FusedActivation,
        FnSpecs=main.FnSpecs,
        PrecisionConfig=main.PrecisionConfig,
        RoutingData=routing.RoutingData,
        GatherIndx=routing.GatherIndx,
        ScatterIndx=routing.ScatterIndx,
        compute_expt_data=routing.compute_expt_data,
        **_package_tensors(),
    )


@functools.cache
def ragged() -> Any:
    """The names of the 3.8 interface that are used here."""
    folder = packaged()
    assert folder is not None
    _package_loaded(folder)
    main = importlib.import_module(f"{PACKAGE}.matmul")
    flags = importlib.import_module(f"{PACKAGE}.matmul_details.opt_flags")
    flags.update_opt_flags_constraints({"split_k": 1})  # as SGLang does on SM90
    tensor = importlib.import_module(f"{PACKAGE}.tensor_details.ragged_tensor")
    return SimpleNamespace(
        matmul=main.matmul,
        FusedActivation=main.FusedActivation,
        FnSpecs=main.FnSpecs,
        PrecisionConfig=main.PrecisionConfig,
        make_ragged_tensor_metadata=tensor.make_ragged_tensor_metadata,
        **_package_tensors(),
    )


def _package_tensors() -> dict[str, Any]:
    tensor = importlib.import_module(f"{PACKAGE}.tensor")
    layout = importlib.import_module(f"{PACKAGE}.tensor_details.layout")
    return {
        "FP4": tensor.FP4,
        "Storage": tensor.Storage,
        "Tensor": tensor.Tensor,
        "convert_layout": tensor.convert_layout,
        "wrap_torch_tensor": tensor.wrap_torch_tensor,
        "HopperMXValueLayout": layout.HopperMXValueLayout,
        "HopperMXScaleLayout": layout.HopperMXScaleLayout,
        "swiglu_fn": importlib.import_module(f"{PACKAGE}.swiglu").swiglu_fn,
    }


@dataclass(frozen=True, slots=True)
class PaddedStack:
    """Codes uint8 (experts, rows, k/2) and scales uint8 (experts, rows, k/32), with zeros added."""

    codes: torch.Tensor
    scales: torch.Tensor


def padded_size(n: int) -> int:
    """The intermediate size that engines load."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def padded13(stack: Fp4Stack, problem: ExpertsProblem, interleaved: bool) -> PaddedStack:
    """w13 with padded gates and ups; with `interleaved`, gate and up rows in turn."""
    return PaddedStack(
        rows13(stack.codes, problem, interleaved), rows13(stack.scales, problem, interleaved)
    )


def rows13(tensor: torch.Tensor, problem: ExpertsProblem, interleaved: bool) -> torch.Tensor:
    """The rows of w13, or the elements of its bias (experts, rows of w13, ..), as w13's are laid
    out."""
    more = padded_size(problem.n) - problem.n
    halves = tensor.unflatten(1, (-1, problem.n))
    around = [0, 0] * (halves.ndim - 3) + [0, more]
    halves = torch.nn.functional.pad(halves, around)
    return (halves.transpose(1, 2) if interleaved else halves).flatten(1, 2).contiguous()


def padded2(stack: Fp4Stack, problem: ExpertsProblem) -> PaddedStack:
    """w2 with a padded k."""
    more = padded_size(problem.n) - problem.n
    block = stack.format.block
    return PaddedStack(
        torch.nn.functional.pad(stack.codes, (0, more // 2)),
        torch.nn.functional.pad(stack.scales, (0, more // block)),
    )


def values_in(api: Any, codes: torch.Tensor, axis: int, as_instance: bool) -> Any:
    """Codes (experts, rows, k/2) in the Hopper value layout, as matrices (k, rows)."""
    wrapped = api.wrap_torch_tensor(codes.transpose(-2, -1), dtype=api.FP4)
    if as_instance:
        layout = api.HopperMXValueLayout(mx_axis=axis, mma_version=3)
        return api.convert_layout(wrapped, layout)
    return api.convert_layout(wrapped, api.HopperMXValueLayout, mx_axis=axis)


def scales_in(api: Any, scales: torch.Tensor, axis: int, as_instance: bool) -> Any:
    """Scales (experts, rows, k/32) in the Hopper scale layout, as (k/32, rows), with NaN in the
    memory behind them, as what an allocator gives there may be."""
    wrapped = api.wrap_torch_tensor(scales.transpose(-2, -1))
    if as_instance:
        layout = api.HopperMXScaleLayout(mx_axis=axis, num_warps=WARPS)
        made = api.convert_layout(wrapped, layout)
    else:
        made = api.convert_layout(wrapped, api.HopperMXScaleLayout, mx_axis=axis, num_warps=WARPS)
    storage = api.Storage(_nan_behind(made.storage.data), made.storage.layout)
    return api.Tensor(storage, dtype=made.dtype, shape=list(made.shape))


def _nan_behind(data: torch.Tensor) -> torch.Tensor:
    """The same elements and strides, at the end of which the memory is full of NaN scales."""
    rows = data if data.is_contiguous() else data.mT
    rows = rows.contiguous()
    memory = torch.full((rows.numel() + _BEHIND,), _NAN, dtype=torch.uint8, device=data.device)
    memory[: rows.numel()] = rows.flatten()
    held = memory[: rows.numel()].view(rows.shape)
    return held if data.is_contiguous() else held.mT


def scale_padding(scales: torch.Tensor, multiple: int, value: int) -> torch.Tensor:
    """Scales (.., blocks) with whole multiples of blocks."""
    return torch.nn.functional.pad(scales, (0, -scales.shape[-1] % multiple), value=value)
