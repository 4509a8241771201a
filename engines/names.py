"""What our backends are in the words of each engine.

These are meanings, not promises: whether an installed engine knows a word, and what it runs without
one, is read from its own source (`installed`). A backend without a word for an engine is never
emitted for it. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

ENGINES = ("sglang", "vllm")
"""Engines that there is an emission for."""

TUNER, RULE = "tuner", "rule"


@dataclass(frozen=True, slots=True)
class EngineNames:
    """One backend's names.

    sglang   SGLang's word, as its ``--fp4-gemm-backend`` has it
    vllm     format -> the linear kernel's class
    linear   vLLM's word for it, as ``linear_backend`` has it
    sms      the SMs on which vLLM means this backend by that class; None: all
    api      ``backend=`` of ``flashinfer.mm_fp4``
    runner   FlashInfer's runner class, where its autotuner keeps tactics of it
    rule     whether the library picks a tactic by a rule of its own, the one that was probed
    note     what a verdict of this backend does not cover there, by engine
    """

    sglang: str | None = None
    vllm: Mapping[str, str] = field(default_factory=dict)
    linear: str | None = None
    sms: tuple[int, ...] | None = None
    api: str | None = None
    runner: str | None = None
    rule: bool = False
    note: Mapping[str, str] = field(default_factory=dict)

    @property
    def picks(self) -> str | None:
        """Who picks among its tactics in an engine: FlashInfer's ``tuner``, the library's own
        ``rule``, or None: it has one."""
        return TUNER if self.runner else RULE if self.rule else None


def _nvfp4(name: str) -> dict[str, str]:
    return {"nvfp4": f"{name}NvFp4LinearKernel"}


NAMES: dict[str, EngineNames] = {
    "flashinfer-cutlass": EngineNames(
        sglang="flashinfer_cutlass",
        vllm=_nvfp4("FlashInferCutlass"),
        linear="flashinfer_cutlass",
        api="cutlass",
        runner="CutlassFp4GemmRunner",
    ),
    "flashinfer-cudnn": EngineNames(
        sglang="flashinfer_cudnn",
        vllm=_nvfp4("FlashInferCudnn"),
        linear="flashinfer_cudnn",
        api="cudnn",
        runner="CudnnFp4GemmRunner",
    ),
    "flashinfer-trtllm": EngineNames(
        sglang="flashinfer_trtllm",
        vllm=_nvfp4("FlashInferTrtllm"),
        linear="flashinfer_trtllm",
        api="trtllm",
        runner="TrtllmGemmRunner",
        note={"vllm": "vLLM gives it 8x4 scale factors up to m=32, and the probe gave it 128x4"},
    ),
    # On SM12x vLLM means another kernel (bf16 x FP4) by this name.
    "flashinfer-cute-dsl": EngineNames(
        sglang="flashinfer_cutedsl",
        vllm=_nvfp4("FlashInferCuteDsl"),
        linear="flashinfer_cutedsl",
        sms=(100, 103),
        api="cute-dsl",
        runner="CuteDSLFp4GemmRunner",
    ),
    "flashinfer-b12x": EngineNames(
        vllm=_nvfp4("FlashInferB12x"),
        linear="flashinfer_b12x",
        api="b12x",
        runner="B12xFp4GemmRunner",
    ),
    # With 16-bit activations: FlashInfer's mm_bf16_fp4. SGLang runs it for W4A4 checkpoints, where
    # a variable asks for it.
    "flashinfer-w4a16-cute-dsl": EngineNames(
        sglang="flashinfer_cutedsl:w4a16",
        vllm={"nvfp4": "FlashInferCuteDslNvFp4W4A16LinearKernel"},
        linear="flashinfer_cutedsl",
    ),
    "flashinfer-cutedsl-low-latency": EngineNames(api="cutedsl_low_latency"),
    "flashinfer-cake": EngineNames(api="cake"),
    "marlin": EngineNames(
        sglang="marlin",
        vllm=_nvfp4("Marlin"),
        linear="marlin",
        note={"vllm": "proven with SGLang's build of Marlin; vLLM runs its own build"},
    ),
    "vllm-marlin": EngineNames(vllm=_nvfp4("Marlin"), linear="marlin"),
    "vllm-cutlass": EngineNames(vllm=_nvfp4("Cutlass"), linear="cutlass"),
    "humming": EngineNames(
        vllm={"nvfp4": "HummingNvFp4LinearKernel", "mxfp4": "HummingMxFp4LinearKernel"},
        linear="humming",
        rule=True,
    ),
}


@dataclass(frozen=True, slots=True)
class ExpertsNames:
    """One backend's names where it computes routed experts: format to the word of SGLang's
    ``--moe-runner-backend``, and of vLLM's ``--moe-backend``; behind a colon what more tells it
    apart, which a variable says.

    sms      by engine: the SMs on which it means this backend by its word; one that is not there
             means it on all
    tactics  those that an engine runs, by a rule of the library's own: the others have no name
    tuner    whether FlashInfer's tuner picks among its tactics
    note     as of `EngineNames`
    """

    sglang: Mapping[str, str] = field(default_factory=dict)
    vllm: Mapping[str, str] = field(default_factory=dict)
    sms: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tactics: str = "default"
    tuner: bool = False
    note: Mapping[str, str] = field(default_factory=dict)

    @property
    def picks(self) -> str:
        """Who picks among its tactics in an engine: FlashInfer's ``tuner``, or the library's own
        ``rule``."""
        return TUNER if self.tuner else RULE


_BOTH = ("nvfp4", "mxfp4")
INSTALLED_SUFFIX = ":installed"
"""After vLLM's words for triton_kernels: not the copy that it brings, but what is installed."""
GROUPED_SUFFIX = ":grouped"
"""After humming's word: its grouped GEMMs and not the indexed ones."""
EXPERTS: dict[str, ExpertsNames] = {
    "marlin-experts": ExpertsNames(
        sglang=dict.fromkeys(_BOTH, "marlin"),
        vllm=dict.fromkeys(_BOTH, "marlin"),
        note={"vllm": "proven with SGLang's build of Marlin; vLLM runs its own build"},
    ),
    "vllm-marlin-experts": ExpertsNames(vllm=dict.fromkeys(_BOTH, "marlin")),
    "humming-indexed": ExpertsNames(
        sglang={"mxfp4": "humming"},
        vllm=dict.fromkeys(_BOTH, "humming"),
        tactics=r"default|rows-\d+",
    ),
    "humming-grouped": ExpertsNames(
        sglang={"mxfp4": f"humming{GROUPED_SUFFIX}"},
        vllm=dict.fromkeys(_BOTH, f"humming{GROUPED_SUFFIX}"),
        tactics=r"default|rows-\d+",
    ),
    # With MXFP4 weights and bf16 tokens on SM90; elsewhere these words mean other kernels.
    "flashinfer-cutlass-experts": ExpertsNames(
        sglang={"mxfp4": "flashinfer_mxfp4"},
        vllm={"mxfp4": "flashinfer_cutlass"},
        sms={"sglang": (90,), "vllm": (90,)},
        tuner=True,
    ),
    # vLLM runs the copy that it brings, unless triton_kernels is installed beside it.
    "vllm-ogs": ExpertsNames(vllm={"mxfp4": "triton"}),
    "vllm-ogs-unfused": ExpertsNames(vllm={"mxfp4": "triton_unfused"}),
    "triton-kernels": ExpertsNames(sglang={"mxfp4": "triton_kernel"}),
}
"""Backends of routed experts. One without an entry is shown and never chosen for an engine."""


def entry_of(backend: str) -> EngineNames | ExpertsNames | None:
    """What is known of a backend's names, dense or of routed experts."""
    return NAMES.get(backend) or EXPERTS.get(backend)


def named(engine: str, backend: str, fmt: str = "nvfp4", sm: int | None = None) -> str | None:
    """What `engine` calls `backend`: the option's value, or vLLM's class. None: it cannot."""
    name = entry_of(backend)
    if name is None:
        return None
    if isinstance(name, ExpertsNames):
        if sm is not None and sm not in name.sms.get(engine, (sm,)):
            return None
        return {"sglang": name.sglang, "vllm": name.vllm}.get(engine, {}).get(fmt)
    if engine == "sglang":
        return name.sglang if fmt == "nvfp4" else None
    if engine == "vllm":
        if name.sms is not None and sm is not None and sm not in name.sms:
            return None
        return name.vllm.get(fmt)
    return name.api


def runs_tactic(backend: str, tactic: str) -> bool:
    """Whether an engine that is told to run this backend of routed experts may come to run that
    tactic: it picks by a rule, and can be told of no other. True for linear layers."""
    name = EXPERTS.get(backend)
    return name is None or re.fullmatch(name.tactics, tactic) is not None


def backend_of(
    engine: str, word: str, fmt: str = "nvfp4", sm: int | None = None, experts: bool = False
) -> str | None:
    """The backend that an engine's word means, None for a word that means none of ours: of linear
    layers, or of routed `experts`. Where two builds of one source share it, the engine's own."""
    table: Mapping[str, EngineNames | ExpertsNames] = EXPERTS if experts else NAMES
    found = [b for b in table if named(engine, b, fmt, sm) == word]
    own = [b for b in found if engine not in table[b].note]
    return next(iter(own or found), None)


def sm_of(arch: str) -> int | None:
    """``sm90`` to 90; None for a CPU."""
    return int(arch[2:]) if arch[:2] == "sm" and arch[2:].isdecimal() else None
