"""The linear modules that are in a checkpoint's files, from the headers of its tensors alone.

The format of each is told by its tensors' names, dtypes and sizes. The like tensors of the experts
of one layer are counted as one: a checkpoint has hundreds of thousands of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .headers import TensorHeader
from .modules import LinearModule
from .quantisation import LayerFormat

_EXPERT = re.compile(r"\.experts\.\d+\.")
_FLOATS = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
_PARTS = {
    "weight": "codes",
    "weight_packed": "codes",
    "qweight": "codes",
    "_weight_qdata": "codes",
    "weight:qdata": "codes",
    "weight_scale": "scales",
    "weight_scale_inv": "scales",
    "scale": "scales",
    "scales": "scales",
    "_weight_scale": "scales",
    "weight:scale": "scales",
    "weight_scale_2": "global",
    "weight_global_scale": "global",
    "_weight_per_tensor_scale": "global",
    "weight:per_tensor_scale": "global",
    "input_scale": "input",
    "input_global_scale": "input",
    "act_global_scale": "input",
    "_weight_act_per_tensor_scale": "input",
    "qzeros": "zeros",
    "absmax": "absmax",
    "weight_zero_point": "zeros",
}
_ENDINGS = (
    ("_weight_scale_2", "global"),
    ("_weight_scale", "scales"),
    ("_input_scale", "input"),
    ("_scale_inv", "scales"),
    ("_blocks", "codes"),
    ("_scales", "scales"),
)
_LOW_RANK = re.compile(r"svdquant|^(lora|proj|low_rank)_(a|b|down|up)$", re.I)
"""What a low-rank part is called that is kept beside codes, as SVDQuant has it."""
_EMBEDDINGS = ("embed", "wte", "wpe", "tok_embeddings", "position")
_UNSOUND = "?"
Shape = tuple[int, ...]


@dataclass(slots=True)
class _Parts:
    """The tensors of one module by part: dtype and shape to how many there are (one an expert)."""

    by_part: dict[str, Counter[tuple[str, Shape]]] = field(default_factory=dict)

    def one(self, part: str) -> tuple[str, Shape] | None:
        found = self.by_part.get(part)
        return next(iter(found)) if found else None

    def count(self, part: str) -> int:
        return sum(self.by_part.get(part, Counter()).values())


Tensors = Mapping[str, TensorHeader]
"""Tensors of a file by name."""


def stored_modules(files: Iterable[Tensors], hidden: int | None) -> list[LinearModule]:
    """The linear modules in the files. `hidden` tells which way round experts of one tensor lie."""
    parts: dict[str, _Parts] = {}
    strange: dict[str, tuple[str, Shape]] = {}
    for name, kinds in _tensors(files).items():
        module, part = _module_and_part(name)
        if module:
            own = parts.setdefault(module, _Parts()).by_part
            own[part] = own[part] + kinds if part in own else kinds
        elif of_no_known_name(name, *next(iter(kinds))):
            strange[name] = next(iter(kinds))
    made = (_linear_module(name, own, hidden) for name, own in parts.items())
    return [*(module for module in made if module is not None), *_strangers(strange, parts)]


NO_KNOWN_NAME = "4-bit codes, by their dtype and shape, under a name that is not known here"
_LEAST = 16
"""Rows and columns that a weight has at least."""


def of_no_known_name(name: str, dtype: str, shape: Shape) -> bool:
    """Whether a tensor may be codes of a linear module, and its name says nothing."""
    small = len(shape) < 2 or min(shape[-2:]) < _LEAST
    return dtype in ("U8", "F4") and not small and not _module_and_part(name)[0]


def _strangers(
    strange: Mapping[str, tuple[str, Shape]], known: Mapping[str, object]
) -> Iterator[LinearModule]:
    """One module for each that has such tensors, the largest of which are its codes."""
    largest: dict[str, Shape] = {}
    for name, (_, shape) in strange.items():
        parent = name.rpartition(".")[0]
        module = name if parent in known or not parent else parent
        largest[module] = max(shape, largest.get(module, (0,)), key=math.prod)
    for module, shape in largest.items():
        yield LinearModule(module, *_last_two(shape), fault=NO_KNOWN_NAME)


def _tensors(files: Iterable[Tensors]) -> dict[str, Counter[tuple[str, Shape]]]:
    """Tensors by name, an expert's number in it left out: how many there are of a dtype and shape.

    The one loop over all tensors of a checkpoint, of which there are hundreds of thousands.
    """
    first: dict[str, list[Any]] = {}
    others: list[tuple[str, TensorHeader]] = []
    for tensors in files:
        for name, about in zip(_alike(tensors), tensors.values(), strict=True):
            alike = first.get(name)
            if alike is None:
                first[name] = [about.shape, about.dtype if about.sound else _UNSOUND, 1]
            elif alike[0] == about.shape and alike[1] == about.dtype:
                alike[2] += 1
            else:
                others.append((name, about))
    found = {n: Counter({(dtype, shape): many}) for n, (shape, dtype, many) in first.items()}
    for name, about in others:
        found[name][about.dtype, about.shape] += 1
    return found


def _alike(tensors: Tensors) -> list[str]:
    """The names of the tensors, ``*`` for the number of an expert: in one pass over all of them."""
    names = _EXPERT.sub(".experts.*.", "\n".join(tensors)).split("\n")
    if len(names) != len(tensors):  # a name that holds a line's end
        return [_EXPERT.sub(".experts.*.", name) for name in tensors]
    return names


def _module_and_part(name: str) -> tuple[str, str]:
    """The module that a tensor is of, and what of it that is; empty for no linear module's."""
    module, _, last = name.rpartition(".")
    if _LOW_RANK.search(last):
        return module, "low rank"
    if last in _PARTS:
        part = _PARTS[last]
        return (module.removesuffix(".weight"), part) if part == "absmax" else (module, part)
    if ".experts" not in module:
        return "", ""
    for ending, part in _ENDINGS:
        if last.endswith(ending):
            return f"{module}.{last.removesuffix(ending)}", part
    return ("", "") if "bias" in last else (name, "codes")


def _linear_module(name: str, parts: _Parts, hidden: int | None) -> LinearModule | None:
    if any(word in name.rpartition(".")[2] for word in _EMBEDDINGS):
        return None
    codes = parts.one("codes")
    if codes is None:
        if parts.count("scales") and parts.count("global"):
            return LinearModule(name, 0, 0, fault="scales without codes")
        return None
    dtype, shape = codes
    fault = _disagreement(name, parts)
    if parts.count("low rank") and not fault:
        fault = "it has a low-rank part beside its codes, which another kernel adds (SVDQuant)"
    if fault:
        return LinearModule(name, *_last_two(shape), _expert_count(name, parts, shape), fault=fault)
    if dtype in _FLOATS:
        return _unquantised(name, parts, shape, LayerFormat(_FLOATS[dtype], "bf16"), hidden)
    format_, sizes, why = _quantised(dtype, shape, parts)
    if format_ is None:
        return (
            LinearModule(name, *_last_two(shape), _expert_count(name, parts, shape), fault=why)
            if why
            else None
        )
    return LinearModule(name, *sizes, _expert_count(name, parts, shape), format_)


def _disagreement(name: str, parts: _Parts) -> str:
    """Why the tensors cannot be believed, or those of like experts are not alike."""
    if any(dtype == _UNSOUND for found in parts.by_part.values() for dtype, _ in found):
        return "dtype, shape and place of a tensor do not agree in its header"
    if "*" not in name:
        return ""
    whole = parts.count("codes")
    for part, found in parts.by_part.items():
        if len(found) > 1:
            kinds = ", ".join(f"{d} {list(s)}" for d, s in sorted(found)[:3])
            return f"the experts differ: {kinds}"
        if part in ("scales", "global") and parts.count(part) != whole:
            return f"{whole} experts have codes, {parts.count(part)} have {_WORDS[part]}"
    return ""


_WORDS = {"scales": "block scales", "global": "a global scale"}


def _expert_count(name: str, parts: _Parts, shape: Shape) -> int:
    if "*" in name:
        return parts.count("codes")
    return shape[0] if ".experts" in name and len(shape) > 2 else 1


def _last_two(shape: Shape) -> tuple[int, int]:
    return (shape[-2], shape[-1]) if len(shape) > 1 else (0, 0)


def _unquantised(
    name: str, parts: _Parts, shape: Shape, format_: LayerFormat, hidden: int | None
) -> LinearModule | None:
    if len(shape) == 2:
        return LinearModule(name, *shape, _expert_count(name, parts, shape), format_)
    if len(shape) == 3 and ".experts" in name:
        n, k = shape[1:]
        inputs = n if "down" in name else k
        # Some families keep experts as (experts, inputs, outputs).
        if hidden and inputs != hidden and hidden in (n, k):
            n, k = k, n
        return LinearModule(name, n, k, shape[0], format_)
    return None


def _quantised(
    dtype: str, shape: Shape, parts: _Parts
) -> tuple[LayerFormat | None, tuple[int, int], str]:
    """(format, (n, k), why it cannot be told) of a module that is quantised in some way."""
    scales = parts.one("scales")
    if parts.count("absmax"):
        return LayerFormat("bitsandbytes", "bf16"), (0, 0), ""
    if dtype == "I32":
        return _int4(shape, scales, parts)
    if len(shape) < 2:
        return None, (0, 0), ""
    if dtype in ("F8_E4M3", "F8_E5M2"):
        micro = scales is not None and scales[0] in ("U8", "F8_E8M0")
        blocks = micro and math.prod(shape) == 32 * math.prod(scales[1]) if scales else False
        return LayerFormat("mxfp8" if blocks else "fp8", "fp8"), _last_two(shape), ""
    if dtype not in ("U8", "I8", "F4"):
        return LayerFormat(f"unknown: {dtype[:20]}", "bf16"), _last_two(shape), ""
    if scales is None:
        return None, (0, 0), "codes without block scales" if dtype != "I8" else "I8 without scales"
    if scales[0] not in ("U8", "F8_E4M3", "F8_E8M0"):
        kind = "int8" if dtype == "I8" else f"unknown: {dtype} with scales of {scales[0]}"
        return LayerFormat(kind, "bf16"), _last_two(shape), ""
    return _fp4_format(dtype, shape, scales, "fp4" if parts.count("input") else "bf16")


def _fp4_format(
    dtype: str, shape: Shape, scales: tuple[str, Shape], activation: str
) -> tuple[LayerFormat | None, tuple[int, int], str]:
    packed = 1 if dtype == "F4" else 2
    elements = packed * math.prod(shape)
    block, rest = divmod(elements, max(1, math.prod(scales[1])))
    name = {16: "nvfp4", 32: "mxfp4"}.get(block if not rest else 0)
    right = {"nvfp4": ("F8_E4M3", "U8"), "mxfp4": ("F8_E8M0", "U8")}.get(name or "", ())
    sizes = fp4_sizes(shape, scales[1], packed, block)
    if name is None or scales[0] not in right or sizes is None:
        why = f"its block scales, {scales[0]} {list(scales[1])}, do not fit {dtype} {list(shape)}"
        return None, (0, 0), why
    return LayerFormat(name, activation), sizes, ""


def fp4_sizes(shape: Shape, scales: Shape, packed: int, block: int) -> tuple[int, int] | None:
    """(n, k) of codes whose block scales have the shape `scales`; None where they do not fit."""
    if scales[:-1] == shape[:-1] and scales[-1] * block == packed * shape[-1]:
        return shape[-2], packed * shape[-1]
    if scales == shape[:-1]:  # the codes of one block have a dimension of their own
        return shape[-3], packed * shape[-2] * shape[-1]
    same = shape[:-2] == scales[:-2] and scales[-1:] == shape[-1:]
    if same and len(scales) > 1 and scales[-2] * block == packed * shape[-2]:
        return shape[-1], packed * shape[-2]  # (experts, inputs, outputs)
    return None


def _int4(
    shape: Shape, scales: tuple[str, Shape] | None, parts: _Parts
) -> tuple[LayerFormat | None, tuple[int, int], str]:
    """AWQ, GPTQ and the like: eight 4-bit integers a word."""
    if len(shape) != 2 or scales is None or len(scales[1]) != 2:
        return LayerFormat("int4", "bf16"), _last_two(shape), ""
    outputs = scales[1][1]
    if parts.count("zeros") and shape[1] * 8 == outputs:
        return LayerFormat("int4 (awq)", "bf16"), (outputs, shape[0]), ""
    if shape[1] == outputs:
        return LayerFormat("int4 (gptq)", "bf16"), (outputs, shape[0] * 8), ""
    return LayerFormat("int4", "bf16"), (shape[0], shape[1] * 8), ""
