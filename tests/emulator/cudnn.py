"""The part of cuDNN's graph API (nvidia-cudnn-frontend 1.13 to 1.32) that FP4 GEMMs use, on a CPU.

From cuDNN's documentation: a tensor is a pointer with dimensions and strides in elements (two FP4
elements to a byte, the even one in the low nibble); ``block_scale_dequantize`` multiplies blocks of
``block_size`` elements by one scale each; scales with ``F8_128x4`` reordering lie in 128x4 tiles,
and their declared dimensions are padded to whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from . import numbers, places

data_type = Enum("data_type", "FP4_E2M1 FP8_E4M3 FP8_E8M0 BFLOAT16 HALF FLOAT")
tensor_reordering = Enum("tensor_reordering", "NONE F8_128x4")
heur_mode = Enum("heur_mode", "A B FALLBACK")

VERSION = 92301
_TORCH = {"BFLOAT16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32}


def backend_version() -> int:
    return VERSION


def create_handle() -> object:
    return object()


def set_stream(handle: object, stream: int) -> None:
    raise RuntimeError("there are no streams on a CPU")


class Tensor:
    """A node's result: where its values come from, and what it was declared as."""

    def __init__(self, compute: Callable[[dict[str, Any]], torch.Tensor], **facts: Any) -> None:
        self.compute = compute
        self.facts = facts
        self.uid: int | None = None
        self.is_output = False

    def set_uid(self, uid: int) -> Tensor:
        self.uid = uid
        return self

    def set_data_type(self, dtype: Any) -> Tensor:
        self.facts["data_type"] = dtype
        return self

    def set_name(self, name: str) -> Tensor:
        return self

    def set_output(self, is_output: bool) -> Tensor:
        self.is_output = is_output
        return self


class pygraph:
    """One graph. Plans are numbered, and any computes the same."""

    PLANS = ("eng0_k1=2", "eng7_k2=3")

    def __init__(self, is_override_shape_enabled: bool = False, **kwargs: Any) -> None:
        self.tensors: list[Tensor] = []
        self.override = is_override_shape_enabled
        self.planned = False
        self.compiled: set[int] = set()

    def _add(self, compute: Callable[[dict[str, Any]], torch.Tensor], **facts: Any) -> Tensor:
        made = Tensor(compute, **facts)
        self.tensors.append(made)
        return made

    def tensor(
        self,
        name: str,
        dim: Any,
        stride: Any,
        data_type: Any,
        reordering_type: Any = tensor_reordering.NONE,
    ) -> Tensor:
        def read(run: dict[str, Any]) -> torch.Tensor:
            shape, strides = run["shapes"].get(made.uid, (dim, stride))
            return _read(run["pack"][made.uid], shape, strides, data_type, reordering_type)

        made = self._add(read, dim=dim, stride=stride, data_type=data_type)
        return made

    def block_scale_dequantize(
        self, value: Tensor, scales: Tensor, block_size: list[int], name: str
    ) -> Tensor:
        def dequantise(run: dict[str, Any]) -> torch.Tensor:
            x, s = value.compute(run), scales.compute(run)
            for axis, block in zip((1, 2), block_size, strict=True):
                s = s.repeat_interleave(block, dim=axis)
            if s.shape[1] < x.shape[1] or s.shape[2] < x.shape[2]:
                raise RuntimeError("there are fewer scales than blocks")
            return x * s[:, : x.shape[1], : x.shape[2]]

        return self._add(dequantise)

    def matmul(self, a: Tensor, b: Tensor, compute_data_type: Any, name: str) -> Tensor:
        return self._add(lambda run: a.compute(run) @ b.compute(run))

    def mul(self, a: Tensor, b: Tensor, compute_data_type: Any, name: str) -> Tensor:
        return self._add(lambda run: a.compute(run) * b.compute(run))

    def validate(self) -> None:
        if sum(t.is_output for t in self.tensors) != 1:
            raise RuntimeError("one tensor is the output")

    def build_operation_graph(self) -> None:
        pass

    def create_execution_plans(self, modes: list[Any]) -> None:
        self.planned = True

    def check_support(self) -> None:
        if not self.planned:
            raise RuntimeError("no plans were made")

    def get_execution_plan_count(self) -> int:
        return len(self.PLANS)

    def get_plan_name_at_index(self, index: int) -> str:
        return self.PLANS[index]

    def build_plan_at_index(self, index: int) -> None:
        self.compiled.add(index)

    def get_workspace_size_plan_at_index(self, index: int, *overrides: Any) -> int:
        return 0

    def execute_plan_at_index(
        self,
        pack: dict[int, torch.Tensor],
        workspace: torch.Tensor,
        index: int,
        handle: Any = None,
        override_uids: Any = (),
        override_shapes: Any = (),
        override_strides: Any = (),
    ) -> None:
        if index not in self.compiled:
            raise RuntimeError("the plan was not built")
        if override_uids and not self.override:
            raise RuntimeError("the graph does not override shapes")
        shapes = dict(
            zip(
                override_uids,
                zip(map(tuple, override_shapes), map(tuple, override_strides), strict=True),
                strict=True,
            )
        )
        (result,) = (t for t in self.tensors if t.is_output)
        out = pack[result.uid]
        if out.dtype != _TORCH[result.facts["data_type"].name] or not out.is_contiguous():
            raise RuntimeError("the output is not what the graph declares")
        exact = result.compute({"pack": pack, "shapes": shapes})
        where = shapes.get(result.uid)
        if where and where[0] != tuple(exact.shape):
            raise RuntimeError(f"the output is {tuple(exact.shape)}, not {where[0]}")
        places.write(out, exact[0])


def _read(
    given: torch.Tensor, dim: tuple[int, ...], stride: tuple[int, ...], kind: Any, order: Any
) -> torch.Tensor:
    """float64 of shape `dim`: what lies at a tensor's address by its declared strides."""
    raw = places.memory(given)
    if order is tensor_reordering.F8_128x4:
        # Declared along k first or last; the rows of the tiles are the other dimension.
        _, first, second = dim
        rows, cols = (first, second) if stride[2] == 1 else (second, first)
        if rows % 128 or cols % 4:
            raise RuntimeError("reordered scales are declared in whole tiles")
        linear = _scales(places.tiled(raw, rows, cols, 128), kind)
        return (linear if stride[2] == 1 else linear.T)[None]
    last = sum((d - 1) * s for d, s in zip(dim, stride, strict=True))
    if kind is data_type.FP4_E2M1:
        flat = numbers.unpack(raw[None])[0]
    elif kind in (data_type.FP8_E4M3, data_type.FP8_E8M0):
        flat = _scales(raw, kind)
    else:
        dtype = _TORCH[kind.name]
        if given.dtype != dtype:
            raise RuntimeError(f"declared {kind.name}, given {given.dtype}")
        flat = raw.view(dtype).to(torch.float64)
    if last >= flat.numel():
        raise RuntimeError(f"reads element {last} of {flat.numel()}")
    return torch.as_strided(flat.contiguous(), dim, stride)


def _scales(raw: torch.Tensor, kind: Any) -> torch.Tensor:
    table = numbers.SCALES["nvfp4" if kind is data_type.FP8_E4M3 else "mxfp4"]
    return table[raw.to(torch.int64)]
