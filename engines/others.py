"""What every engine calls our backends, in one document: also engines without an emission.

For TensorRT-LLM, LMDeploy and TokenSpeed the names are those of their sources, as far as these
give them; nothing of them is read where they are installed. Many run a build of their own of what
we have from FlashInfer or SGLang: then a verdict here is about other machine code, and says so.
Standard library only.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from ..cache.errors import Missing
from ..cache.reader import Reader
from . import names, select
from .names import NAMES


@dataclass(frozen=True, slots=True)
class ForeignName:
    """What another engine calls one of our backends.

    same_code  whether it calls the very library that was probed; otherwise it has a build of its
               own, which no verdict here covers
    """

    name: str
    same_code: bool


@dataclass(frozen=True, slots=True)
class ForeignEngine:
    """An engine without an emission.

    how   how one of the names is asked for
    note  what the engine does by itself, and what it lacks
    """

    version: str
    how: str
    note: str
    backends: dict[str, ForeignName]


OTHERS = {
    "tensorrt-llm": ForeignEngine(
        version="1.x, tensorrt_llm/llmapi/llm_args.py",
        how="nvfp4_gemm_config: {allowed_backends: [NAME]} in the file of --config",
        note=(
            "its own tuner picks among the allowed backends and their tactics for each shape, by"
            " time alone; by itself it allows cutlass, cublaslt and cuda_core"
        ),
        backends={
            "flashinfer-cutlass": ForeignName("cutlass", False),
            "flashinfer-cute-dsl": ForeignName("cutedsl", False),
            "torch-scaled-mm": ForeignName("cublaslt", False),
            "marlin": ForeignName("marlin", False),
        },
    ),
    "lmdeploy": ForeignEngine(
        version="0.18.0",
        how="",
        note=(
            "it has no dense NVFP4 GEMM; TurboMind loads MXFP4 weights and its PyTorch engine FP4"
            " experts, each with kernels of its own that have no name to ask for"
        ),
        backends={},
    ),
    "tokenspeed": ForeignEngine(
        version="0.1.1, tokenspeed-kernel 0.1.4",
        how="",
        note=(
            "its registry takes the kernel of the highest priority that fits, which is"
            " cublaslt_mm_nvfp4 before flashinfer_mm_nvfp4; neither has an option. It calls"
            " FlashInfer with backend cutlass and enable_pdl off unless its caller asks for it"
        ),
        backends={
            "flashinfer-cutlass": ForeignName("flashinfer_mm_nvfp4", True),
            "flashinfer-w4a16-cute-dsl": ForeignName("flashinfer_cute_dsl_mm_nvfp4_a16", True),
            "torch-scaled-mm": ForeignName("cublaslt_mm_nvfp4", False),
        },
    ),
}


def reader_for(
    state: str | os.PathLike[str] | None, arch: str | None, gpu: str | None, profile: str | None
) -> Reader:
    """A reader of what was probed for this GPU, under `profile`, or the first of ``strict`` and the
    engines' that there is. Raises StateError."""
    last: Missing | None = None
    for name in (profile,) if profile else ("strict", *names.ENGINES):
        try:
            return select.open_for(name, state, arch=arch, gpu=gpu, profile=name)
        except Missing as error:
            last = error
    assert last is not None
    raise last


def explained(reader: Reader) -> dict[str, Any]:
    """What is proven here for each bucket, and what every engine calls it."""
    scope = reader.scope()
    choices = [
        {
            key: row[key]
            for key in (
                "format", "activation", "n", "k", "m_lo", "m_hi", "backend", "tactic", "layout",
                "status", "median_us",
            )
        }
        for row in reader.rows("choice")
        if (row["arch"], row["gpu"], row["profile"]) == scope
    ]  # fmt: skip
    return {
        "scope": dict(zip(("arch", "gpu", "profile"), scope or (None,) * 3, strict=True)),
        "generation": reader.generation,
        "choices": choices,
        "engines": {
            **{engine: _known(engine) for engine in names.ENGINES},
            **{name: {"emission": False, **asdict(engine)} for name, engine in OTHERS.items()},
        },
    }


def _known(engine: str) -> dict[str, Any]:
    """An engine that there is an emission for, in the same form."""
    found: dict[str, Any] = {}
    for backend in NAMES:
        for fmt in ("nvfp4", "mxfp4"):
            word = names.named(engine, backend, fmt)
            if word is not None:
                same = engine not in NAMES[backend].note
                found.setdefault(backend, {"name": word, "same_code": same})
    return {
        "emission": True,
        "how": f"fp4tune emit {engine}",
        "note": "what the installed one takes is read from its own source when it is emitted",
        "backends": found,
    }
