"""Plugin level ``watch``: the witness behind the FP4 GEMMs that an engine runs.

Weights are read where an engine has loaded them and not yet prepared them; calls are seen behind
`flashinfer.mm_fp4` and the entries of Marlin, humming and CUTLASS, in operators that torch.compile
does not look into. Modules are patched as the engine imports them; none is imported here. What is
in no known form is told once and left alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..cache import reader as reading
from ..cache import state
from ..cache.ledger import Ledger
from . import names
from .notice import guarded, say_once
from .stand_in import StandIn

SHARE = "FP4TUNE_WATCH"
"""``few`` or ``every`` (docs/witness.md); set, it has the plugins watch at every level but off."""
REACT = "FP4TUNE_ON_FAULT"
"""``log``, ``quarantine`` or ``stop``."""
CHECKPOINT = "FP4TUNE_CHECKPOINT"
"""The checkpoint's folder or name, for the processes of an engine that says it to the first only.
"""
MARK = "fp4tune_mark"
"""The name of a layer's buffer that the operator is said to change."""
_MARKED = "_fp4tune_watches"
_VLLM_KERNELS = "vllm.model_executor.kernels.linear"
_SGLANG = "sglang.srt.layers.quantization"
_PREPARE = "process_weights_after_loading"
_APPLY = "apply_weights"
_W4A16 = ("Marlin", "Humming", "W4A16")
"""What is in the names of vLLM's kernels that take 16-bit activations."""
Patch = Callable[[ModuleType], None]


def wanted(level: str) -> bool:
    """Whether the plugins watch at `level`, as the environment has it."""
    return level == "watch" or (level != "off" and bool(os.environ.get(SHARE, "").strip()))


def install(engine: str) -> None:
    """Watch what `engine` runs, once its modules are imported. A second call does nothing."""
    if any(isinstance(each, WatchedImports) for each in sys.meta_path):
        return
    patches = _vllm() if engine == "vllm" else _sglang()
    patches["flashinfer"] = _patch_flashinfer
    for name, patch in patches.items():
        if name in sys.modules:
            guarded(patch)(sys.modules[name])
    sys.meta_path.insert(0, WatchedImports(patches))
    say_once(f"fp4tune watches the FP4 GEMMs of {engine} (docs/witness.md)")


class WatchedImports(MetaPathFinder):
    """Patches modules, each once, when they have been imported."""

    def __init__(self, patches: dict[str, Patch]) -> None:
        self._patches = dict(patches)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        patch = self._patches.pop(name, None)
        if patch is None:
            return None
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            self._patches[name] = patch
            return None
        spec.loader = PatchedLoading(spec.loader, guarded(patch))
        return spec


class PatchedLoading(Loader):
    """A module's own loader, with a patch after it."""

    def __init__(self, loader: Any, patch: Patch) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


# -- vLLM: kernels are classes, with a method that prepares and one that is called


def _vllm() -> dict[str, Patch]:
    found: dict[str, Patch] = {}
    for fmt, files in (
        ("nvfp4", ("marlin", "humming", "cutlass", "flashinfer", "b12x")),
        ("mxfp4", ("marlin", "humming", "flashinfer", "b12x")),
    ):
        for file in files:
            found[f"{_VLLM_KERNELS}.{fmt}.{file}"] = functools.partial(_patch_kernels, fmt)
    return found


def _patch_kernels(fmt: str, module: ModuleType) -> None:
    for kernel in list(vars(module).values()):
        own = isinstance(kernel, type) and kernel.__module__ == module.__name__
        if own and _PREPARE in vars(kernel) and not hasattr(kernel, _MARKED):
            backend = names.backend_of("vllm", kernel.__name__, fmt) or kernel.__name__
            setattr(kernel, _PREPARE, _loading(getattr(kernel, _PREPARE), backend, 1, False))
            if any(word in kernel.__name__ for word in _W4A16):
                setattr(kernel, _APPLY, _applying(getattr(kernel, _APPLY)))
            setattr(kernel, _MARKED, True)
    gemm = getattr(module, "cutlass_scaled_fp4_mm", None)
    if gemm is not None:
        module.cutlass_scaled_fp4_mm = _calling(gemm, _cutlass)  # type: ignore[attr-defined]


def _applying(original: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_weights` of a kernel with 16-bit activations, with the witness behind it."""
    import torch

    from ..witness import operator

    compiling = torch.compiler.is_compiling

    @functools.wraps(original)
    def apply_weights(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        out = original(self, layer, x, bias)
        mark = getattr(layer, MARK, None)
        if mark is None or not isinstance(x, torch.Tensor):
            return out
        if compiling():
            torch.ops.fp4tune.witness(x, out, layer.weight, mark, bias)
        else:
            operator.see_rows(x, out, layer.weight, bias)
        return out

    return apply_weights


# -- SGLang: linear methods prepare, and call functions of other modules


def _sglang() -> dict[str, Patch]:
    schemes = f"{_SGLANG}.compressed_tensors.schemes.compressed_tensors"
    return {
        f"{_SGLANG}.modelopt_quant": _patch_methods,
        f"{schemes}_w4a16_nvfp4": _patch_methods,
        f"{schemes}_w4a4_nvfp4": _patch_methods,
        f"{_SGLANG}.marlin_utils_fp4": _patch_sglang_marlin,
    }


def _patch_methods(module: ModuleType) -> None:
    for method in list(vars(module).values()):
        own = isinstance(method, type) and method.__module__ == module.__name__
        if not own or "Moe" in method.__name__ or "MoE" in method.__name__:
            continue
        if _PREPARE in vars(method) and "F" in method.__name__ and not hasattr(method, _MARKED):
            setattr(method, _PREPARE, _loading(getattr(method, _PREPARE), None, 1, None))
            setattr(method, _MARKED, True)


def _patch_sglang_marlin(module: ModuleType) -> None:
    original = module.apply_fp4_marlin_linear
    module.apply_fp4_marlin_linear = _calling(original, _marlin)  # type: ignore[attr-defined]


def _sglang_backend(layer: Any) -> str:
    """Our name of what SGLang runs layers with, as it was started."""
    utils = sys.modules.get(f"{_SGLANG}.fp4_utils")
    chosen = getattr(utils, "get_fp4_gemm_runner_backend", None)
    word = getattr(chosen() if chosen else None, "value", None)
    if hasattr(layer, "weight_packed") and not hasattr(layer, "input_scale"):
        word = word or "marlin"
    return names.backend_of("sglang", str(word)) or str(word or "unknown")


# -- what both share: weights as they load


def _loading(
    original: Callable[..., Any], backend: str | None, at: int, inverse: bool | None
) -> Callable[..., Any]:
    """A method that prepares the weights of a layer (its argument `at`), which are read before."""

    @functools.wraps(original)
    def process_weights_after_loading(*args: Any, **kwargs: Any) -> Any:
        layer = args[at] if len(args) > at else kwargs.get("layer")
        raw = _read(layer, inverse)
        found = original(*args, **kwargs)
        if raw is not None:
            _register(layer, raw, backend or _sglang_backend(layer))
        return found

    return process_weights_after_loading


@guarded
def _read(layer: Any, inverse: bool | None) -> Any:
    """(name, weight, bias) of a layer as it was loaded; None for one that is left alone."""
    import torch

    from ..witness import forms, process
    from ..witness.calls import Unreadable

    name = str(getattr(layer, "prefix", None) or type(layer).__name__)
    try:
        weight = forms.weight_of(layer, inverse)
    except Unreadable as error:
        if process.mine().witness.leave(name, str(error)):
            say_once(f"fp4tune: {name} is not watched: {error}", logging.WARNING)
        return None
    # Preparing may change it in place: sums are made from a copy that goes as soon as they are.
    bias = getattr(layer, "bias", None)
    return name, weight.clone(), bias.detach().clone() if isinstance(bias, torch.Tensor) else None


@guarded
def _register(layer: Any, raw: tuple[str, Any, Any], backend: str) -> None:
    import torch

    from ..probes.problem import Fp4Tensor, Problem
    from ..witness import checkpoint, operator, process
    from ..witness.calls import Unreadable
    from ..witness.watcher import WatchSubject

    name, weight, bias = raw
    prepared = getattr(layer, "weight", None)
    if not isinstance(prepared, torch.Tensor) or not isinstance(weight, Fp4Tensor):
        if process.mine().witness.leave(name, why := "prepared, it has no weight to know it by"):
            say_once(f"fp4tune: {name} is not watched: {why}", logging.WARNING)
        return
    n, k = weight.shape
    dtype = getattr(layer, "params_dtype", None) or getattr(layer, "orig_dtype", torch.bfloat16)
    out_dtype = "fp16" if dtype == torch.float16 else "bf16"
    activation = "bf16" if _sixteen_bit(backend) else "fp4"
    if activation == "fp4":
        # The factor of a W4A4 call, which comes with it, holds the weight's scale.
        weight = type(weight)(
            weight.format, weight.codes, weight.scales, torch.ones_like(weight.global_scale)
        )
    problem = Problem(weight.format.name, 1, n, k, activation, out_dtype)
    width, accumulation = proven_accuracy(backend, problem)
    subject = WatchSubject(name, backend, problem, "default", width, accumulation)
    own = process.mine().witness
    try:
        source = checkpoint.find(name, weight, _checkpoint_folder())
        watched = own.add(subject, [weight], source, bias)
    except Unreadable as error:
        if own.leave(name, str(error)):
            say_once(f"fp4tune: {name} is not watched: {error}", logging.WARNING)
        return
    operator.know(prepared, own, watched)
    own.hold(watched, prepared)
    if isinstance(layer, torch.nn.Module) and activation == "bf16":
        mark = torch.zeros(1, dtype=torch.uint8, device=prepared.device)
        layer.register_buffer(MARK, mark, persistent=False)


def _checkpoint_folder() -> str | None:
    """The checkpoint that this process loads, as its engine says; None where it does not."""
    with contextlib.suppress(Exception):  # whatever it does where there is no such thing
        if "vllm.config" in sys.modules:
            config = sys.modules["vllm.config"].get_current_vllm_config()
            return str(config.model_config.model)
    return os.environ.get(CHECKPOINT) or None


def _sixteen_bit(backend: str) -> bool:
    return any(word in backend.lower() for word in ("marlin", "humming", "w4a16"))


@functools.lru_cache(maxsize=4096)
def proven_accuracy(backend: str, problem: Any) -> tuple[int | None, float | None]:
    """(width of the accumulator in bits, accumulation) of a backend in a layer, as the probes of
    this node measured them; None for what none did. Of several tactics and buckets the worst."""
    places = state.holding_places()
    if not places:
        return None, None
    try:
        rows = reading.open(places[0]).rows("candidate")
        with Ledger.open(places[0], readonly=True) as ledger:
            measured = ledger.evidence(backend=backend)
    except Exception:
        return None, None
    widths = [
        row["width"]
        for row in rows
        if (row["backend"], row["n"], row["k"]) == (backend, problem.n, problem.k)
        and (row["format"], row["out_dtype"]) == (problem.format, problem.out_dtype)
    ]
    sums = [
        float(row.detail["accumulation"])
        for row in measured
        if (row.bucket.n, row.bucket.k) == (problem.n, problem.k)
        and (row.bucket.format, row.bucket.out_dtype) == (problem.format, problem.out_dtype)
        and isinstance(row.detail.get("accumulation"), (int, float))
    ]
    width = min(widths) if widths and all(widths) else None
    worst = max(sums, default=None)
    return width, worst if worst is not None and 0 <= worst < 1 else None


# -- calls


def _calling(original: Callable[..., Any], seen: Callable[..., None]) -> Callable[..., Any]:
    """A function that gives a GEMM's output, with the witness behind it."""
    if hasattr(original, _MARKED):
        return original
    order = _parameters(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        seen(dict(zip(order, args, strict=False)) | kwargs, out)
        return out

    setattr(call, _MARKED, True)
    return call


def _parameters(function: Any) -> list[str]:
    """The names of a function's parameters in order; an operator's are in its schema."""
    overload = getattr(function, "default", function)
    schema = getattr(overload, "_schema", None)
    if schema is not None:
        return [argument.name for argument in schema.arguments]
    return list(inspect.signature(function).parameters)


def _marlin(given: dict[str, Any], out: Any) -> None:
    import torch

    from ..witness import operator

    call = given["input"], out, given["weight"], given.get("bias")
    if torch.compiler.is_compiling():
        torch.ops.fp4tune.witness_after(*call)
    else:
        operator.see_rows(*call)


def _cutlass(given: dict[str, Any], out: Any) -> None:
    import torch

    from ..witness import operator

    a, scales, alpha, form = given["a"], given["block_scale_a"], given["alpha"], "nvfp4 128x4"
    if torch.compiler.is_compiling():
        torch.ops.fp4tune.witness_fp4(a, scales, out, given["b"], alpha, form)
    else:
        operator.see_fp4((a, scales), out, given["b"], alpha, form)


def _patch_flashinfer(module: ModuleType) -> None:
    """`flashinfer.mm_fp4`, wherever it is bound already: inside both engines' operators."""
    original = getattr(module, "mm_fp4", None)
    if original is None or isinstance(original, WatchedGemm):
        return
    import torch

    compiling = torch.compiler.is_compiling
    order = _parameters(getattr(original, "_fp4tune_original", original))

    def mm_fp4(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if not compiling():
            _see_mm_fp4(dict(zip(order, args, strict=False)) | kwargs, out)
        return out

    kind = type("WatchedGemm", (WatchedGemm,), {"__call__": staticmethod(mm_fp4)})
    wrapped = kind(original)
    module.mm_fp4 = wrapped  # type: ignore[attr-defined]
    for bound in list(sys.modules.values()):
        own = getattr(bound, "__name__", "").partition(".")[0]
        if own in ("flashinfer", "fp4tune"):
            continue
        for attribute, value in list(getattr(bound, "__dict__", {}).items()):
            if value is original:
                setattr(bound, attribute, wrapped)


@guarded
def _see_mm_fp4(given: dict[str, Any], out: Any) -> None:
    from ..witness import operator

    fmt = "nvfp4" if given.get("use_nvfp4", True) else "mxfp4"
    layout = "8x4" if given.get("use_8x4_sf_layout") else "128x4"
    operator.see_fp4(
        (given["a"], given["a_descale"]), out, given["b"], given.get("alpha"), f"{fmt} {layout}"
    )


class WatchedGemm(StandIn):
    """`mm_fp4` with the witness behind it."""


def unwatched() -> Sequence[str]:
    """What is watched nowhere in this process."""
    from ..witness import process

    return process.mine().witness.unwatched()
