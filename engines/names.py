"""What the engines call the backends, and what they take by themselves.

Read from SGLang 0.5.23, vLLM 0.33.0 and FlashInfer 0.7.2; `installed` says whether the engine here
still knows a name. A backend without a name for an engine is never emitted for it. Standard
library only.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

ENGINES = ("sglang", "vllm")
VERSIONS = {"sglang": "0.5.23", "vllm": "0.33.0", "flashinfer": "0.7.2"}
"""The versions that the names and orders here were read from."""


class Name:
    """One backend's names.

    sglang   value of ``--fp4-gemm-backend``
    vllm     format -> the linear kernel's class
    linear   value of vLLM's ``linear_backend``
    sms      the SMs on which vLLM takes that class for this kernel; None: all that it supports
    api      ``backend=`` of ``flashinfer.mm_fp4``
    runner   FlashInfer's runner class, where its autotuner keeps tactics of it
    note     what a verdict of this backend does not cover there, by engine
    only     the activation the names are for, where the engine uses them for another backend too
    """

    __slots__ = ("only", "api", "linear", "note", "runner", "sglang", "sms", "vllm")

    def __init__(
        self,
        sglang: str | None = None,
        vllm: Mapping[str, str] | None = None,
        linear: str | None = None,
        sms: tuple[int, ...] | None = None,
        api: str | None = None,
        runner: str | None = None,
        note: Mapping[str, str] | None = None,
        only: str | None = None,
    ) -> None:
        self.sglang = sglang
        self.vllm = vllm or {}
        self.linear = linear
        self.sms = sms
        self.api = api
        self.runner = runner
        self.note = note or {}
        self.only = only


def _nvfp4(name: str) -> dict[str, str]:
    return {"nvfp4": f"{name}NvFp4LinearKernel"}


NAMES: dict[str, Name] = {
    "flashinfer-cutlass": Name(
        "flashinfer_cutlass",
        _nvfp4("FlashInferCutlass"),
        "flashinfer_cutlass",
        api="cutlass",
        runner="CutlassFp4GemmRunner",
    ),
    "flashinfer-cudnn": Name(
        "flashinfer_cudnn",
        _nvfp4("FlashInferCudnn"),
        "flashinfer_cudnn",
        api="cudnn",
        runner="CudnnFp4GemmRunner",
    ),
    "flashinfer-trtllm": Name(
        "flashinfer_trtllm",
        _nvfp4("FlashInferTrtllm"),
        "flashinfer_trtllm",
        api="trtllm",
        runner="TrtllmGemmRunner",
        note={"vllm": "vLLM gives it 8x4 scale factors up to m=32, and the probe gave it 128x4"},
    ),
    # On SM12x vLLM means another kernel (bf16 x FP4) by this name.
    "flashinfer-cute-dsl": Name(
        "flashinfer_cutedsl",
        _nvfp4("FlashInferCuteDsl"),
        "flashinfer_cutedsl",
        sms=(100, 103),
        api="cute-dsl",
        runner="CuteDSLFp4GemmRunner",
    ),
    "flashinfer-b12x": Name(
        None,
        _nvfp4("FlashInferB12x"),
        "flashinfer_b12x",
        api="b12x",
        runner="B12xFp4GemmRunner",
    ),
    # In 16-bit activations the engines mean FlashInfer's mm_bf16_fp4 by these.
    "flashinfer-w4a16-cudnn": Name("flashinfer_cudnn", only="bf16"),
    "flashinfer-w4a16-cute-dsl": Name(
        "flashinfer_cutedsl",
        {"nvfp4": "FlashInferCuteDslNvFp4W4A16LinearKernel"},
        "flashinfer_cutedsl",
        only="bf16",
    ),
    "flashinfer-cutedsl-low-latency": Name(api="cutedsl_low_latency"),
    "flashinfer-cake": Name(api="cake"),
    "marlin": Name(
        "marlin",
        _nvfp4("Marlin"),
        "marlin",
        note={"vllm": "proven with SGLang's build of Marlin; vLLM runs its own build"},
    ),
    "vllm-marlin": Name(None, _nvfp4("Marlin"), "marlin"),
    "vllm-cutlass": Name(None, _nvfp4("Cutlass"), "cutlass"),
    "humming": Name(
        None,
        {"nvfp4": "HummingNvFp4LinearKernel", "mxfp4": "HummingMxFp4LinearKernel"},
        "humming",
    ),
}

VLLM_KERNELS = {
    "nvfp4": (
        "FlashInferCuteDslNvFp4LinearKernel",
        "FlashInferCutlassNvFp4LinearKernel",
        "FlashInferB12xNvFp4LinearKernel",
        "CutlassNvFp4LinearKernel",
        "FlashInferCuteDslNvFp4W4A16LinearKernel",
        "MarlinNvFp4LinearKernel",
        "FlashInferTrtllmNvFp4LinearKernel",
        "FlashInferCudnnNvFp4LinearKernel",
        "FbgemmNvFp4LinearKernel",
        "B12xNvFp4LinearKernel",
        "B12xNvFp4W4A16LinearKernel",
        "TorchNvFp4LinearKernel",
        "HummingNvFp4LinearKernel",
    ),
    "mxfp4": (
        "FlashInferMxFp4LinearKernel",
        "MarlinMxFp4LinearKernel",
        "HummingMxFp4LinearKernel",
        "B12xMxFp4LinearKernel",
    ),
}
"""vLLM's kernels of each format in the order it tries them, its emulation left out."""

_DEFAULTS: dict[str, tuple[tuple[tuple[int, int], tuple[str, ...]], ...]] = {
    "sglang": (
        ((80, 99), ("marlin",)),
        ((100, 109), ("flashinfer-cute-dsl",)),
        ((110, 999), ("flashinfer-cutlass",)),
    ),
    "vllm": (
        ((90, 90), ("humming", "vllm-marlin")),
        ((80, 99), ("vllm-marlin", "humming")),
        ((100, 109), ("flashinfer-cute-dsl", "flashinfer-cutlass", "vllm-cutlass", "vllm-marlin")),
        ((110, 999), ("flashinfer-cutlass", "flashinfer-b12x", "vllm-cutlass", "vllm-marlin")),
    ),
}


def named(engine: str, backend: str, fmt: str = "nvfp4", sm: int | None = None) -> str | None:
    """What `engine` calls `backend`: the option's value, or vLLM's class. None: it cannot."""
    name = NAMES.get(backend)
    if name is None:
        return None
    if engine == "sglang":
        return name.sglang if fmt == "nvfp4" else None
    if engine == "vllm":
        if name.sms is not None and sm is not None and sm not in name.sms:
            return None
        return name.vllm.get(fmt)
    return name.api


def backend_of(engine: str, word: str, activation: str) -> str | None:
    """The backend that an engine's word means for layers with this activation; None for ``auto``
    and unknown words."""
    found = None
    for backend, name in NAMES.items():
        words = {name.sglang} if engine == "sglang" else {name.linear, *name.vllm.values()}
        if word in words and name.only in (None, activation):
            if name.only is not None:
                return backend
            found = found or backend
    return found


def defaults(engine: str, sm: int | None) -> tuple[str, ...]:
    """What `engine` takes on that SM without advice: the first of these that is installed."""
    for (low, high), backends in _DEFAULTS.get(engine, ()):
        if sm is not None and low <= sm <= high:
            return backends
    return ()


def sm_of(arch: str) -> int | None:
    """``sm90`` to 90; None for a CPU."""
    return int(arch[2:]) if arch[:2] == "sm" and arch[2:].isdecimal() else None
