"""The humming-kernels library, whichever of its versions is installed.

Written for 0.1.12 (which SGLang 0.5.23 pins), 0.1.19 (vLLM 0.33) and 0.1.20; they differ in the
arguments that functions take, and in which thread may load a kernel. What is installed is read from
its source, since importing it starts a compiler.

humming compiles with NVRTC where it can be imported, else nvcc; here nvcc is asked for unless
``HUMMING_COMPILER`` is set, because NVRTC also needs its builtins on the library path. Products
are kept in humming's own cache (``HUMMING_CACHE_DIR``, else ``~/.humming/cache``), which an engine
on the same node shares.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..problem import FORMATS, NVFP4

DISTRIBUTION = "humming-kernels"
KNOWN = ("0.1.12", "0.1.19", "0.1.20")
"""Versions whose source was read for what is here."""
PAD_N, PAD_K = 256, 128
"""The multiples that engines let humming pad a weight to."""
SCHEMAS = {
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "nvfp4"},
    "mxfp4": {"quant_method": "mxfp4"},
}
_ANY_M = 1 << 30
"""The end of humming's last interval of m."""
_NEEDED = {
    "forward.py": (
        "humming_forward",
        {
            "config", "inputs", "weight", "weight_scale", "weight_scale_2", "bias", "outputs",
            "sorted_ids", "expert_ids", "num_tokens_padded", "expert_layout", "locks", "top_k",
            "valid_shape_m", "compute_config", "tuning_config",
        },
    ),
    "transform.py": (
        "prepare_layer_config",
        {
            "shape_n", "shape_k", "weight_schema", "input_schema", "num_experts",
            "pad_n_to_multiple", "pad_k_to_multiple", "has_bias", "torch_dtype",
        },
    ),
    "tune/__init__.py": (
        "get_heuristics_config",
        {"layer_config", "shape_m", "use_f16_accum", "use_batch_invariant", "gemm_type"},
    ),
}  # fmt: skip
"""By file: the function that is called, and the arguments that it is given."""
_SHAPE = re.compile(r"\d+(?:x\d+)+")
_FIELD = re.compile(r"([a-z][a-z0-9_]*)=([a-z0-9_]+)")


def unusable() -> str | None:
    """Why what is installed cannot be called, in one sentence; None where it can."""
    found = importlib.util.find_spec("humming")
    places = list(found.submodule_search_locations or ()) if found else []
    folder = next((Path(p) for p in places if Path(p, "forward.py").is_file()), None)
    if folder is None:
        return "humming is not installed (pip install humming-kernels)"
    for file, (function, needed) in _NEEDED.items():
        lacking = needed - _arguments(folder / file, function)
        if lacking:
            return (
                f"humming-kernels {version()} is not known here ({', '.join(KNOWN)} are): its "
                f"{function} does not take {', '.join(sorted(lacking))}"
            )
    return None


def version() -> str:
    """The version that is installed, or a question mark."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "?"


@functools.cache
def _arguments(file: Path, function: str) -> frozenset[str]:
    """The names of a function's arguments, read from its file; empty where it is not there."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError):
        return frozenset()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return frozenset(a.arg for a in (*node.args.args, *node.args.kwonlyargs))
    return frozenset()


@functools.cache
def library() -> Any:
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
        may_process_input=getattr(forward, "may_process_input", None),
    )


def taken(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """Those of the arguments that this version of a function takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in known}


def standard(
    format_name: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, experts: int = 0
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A checkpoint's tensors as humming's standard ones, with their schema.

    weight uint8 (n, k/2), weight_scale uint8 (n, k/block), weight_scale_2 float32 (1,); an
    expert's index before, (experts,), where there are any.
    """
    loaded = library().BaseWeightSchema.from_config(SCHEMAS[format_name])
    codes = tensors["weight"]
    found: tuple[Any, dict[str, torch.Tensor]] = loaded.convert_humming(
        tensors=dict(tensors),
        shape_n_stacks=[codes.shape[-2]],
        shape_k_stacks=[2 * codes.shape[-1]],
        param_dtype=dtype,
        num_experts=experts or None,
        **taken(loaded.convert_humming, device=codes.device),
    )
    return found


@functools.lru_cache(maxsize=64)
def _schema(format_name: str, dtype: torch.dtype, experts: int, index: int) -> Any:
    """What `standard` calls the schema of such weights: it is said of tensors only."""
    block = FORMATS[format_name].block
    lead = (experts,) if experts else ()
    device = torch.device("cuda", index) if torch.cuda.is_available() else "cpu"
    small = {
        "weight": torch.zeros(*lead, 1, block // 2, dtype=torch.uint8, device=device),
        "weight_scale": torch.zeros(*lead, 1, 1, dtype=torch.uint8, device=device),
    }
    if format_name == NVFP4.name:
        small["weight_scale_2"] = torch.ones(experts or 1, device=device)
    return standard(format_name, small, dtype, experts)[0]


@functools.lru_cache(maxsize=4096)
def config_of(
    format_name: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    index: int,
    experts: int = 0,
    biased: bool = False,
) -> Any:
    """humming's description of W4A16 matrices (n, k) on a GPU; no tensors are needed for it."""
    h = library()
    with torch.cuda.device(index):
        return h.prepare_layer_config(
            shape_n=shape[0],
            shape_k=shape[1],
            weight_schema=_schema(format_name, dtype, experts, index),
            input_schema=h.HummingInputSchema(),
            num_experts=experts or None,
            pad_n_to_multiple=PAD_N,
            pad_k_to_multiple=PAD_K,
            has_bias=biased,
            torch_dtype=dtype,
            **taken(h.prepare_layer_config, device=torch.device("cuda", index)),
        )


def heuristics(config: Any, options: Mapping[str, Any], index: int, m: int | None = None) -> Any:
    """The schedule humming's rule has for m rows, or all of them: (low, high], schedule."""
    ask = library().get_heuristics_config
    device = torch.device("cuda", index)
    with torch.cuda.device(index):
        return ask(config, shape_m=m, **options, **taken(ask, device=device))


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
    known = {*(f.name for f in fields(library().TuningConfig)), "use_f16_accum", "num_sms"}
    if not tuning.keys() <= known:
        odd = ", ".join(sorted(tuning.keys() - known))
        raise ValueError(f"this humming has no schedule with {odd}")
    return json.dumps(tuning)


def compile_schedules(wanted: Sequence[tuple[Any, str, str]], index: int, workers: int) -> None:
    """Compile and load kernels: (description, compute options as JSON, schedule's name) each.

    Raises whatever humming raises; RuntimeError names the compiler's log.
    """
    prepare = library().HummingKernel.prepare_kernels

    def one(config: Any, compute: str, tactic: str) -> None:
        with torch.cuda.device(index):
            prepare(config.to_str(), compute, tuning_json(tactic), **taken(prepare, device=index))

    if "device" in inspect.signature(prepare).parameters:
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            list(pool.map(lambda item: one(*item), wanted))
        return
    # 0.1.12 loads kernels on the main thread only, and compiles those of one call beside each
    # other: so several schedules go in one, as intervals, before each is asked for by itself.
    together: dict[tuple[str, str], list[list[Any]]] = {}
    for config, compute, tactic in wanted:
        mine = together.setdefault((config.to_str(), compute), [])
        mine.append([0, _ANY_M, json.loads(tuning_json(tactic))])
    with torch.cuda.device(index):
        for (config_text, compute), intervals in together.items():
            for first in range(0, len(intervals), max(1, workers)):
                prepare(config_text, compute, json.dumps(intervals[first : first + workers]))
    for item in wanted:
        one(*item)


def compiled_files() -> list[Path]:
    """The cubins of the GEMM kernels this process has compiled or loaded."""
    kernels = library().HummingKernel._id2kernel.values()
    return sorted({Path(kernel.kernel_filename) for kernel in kernels})
