"""What FlashInfer's `mm_fp4` backends can run, asked without a GPU and without calling them.

FlashInfer's own table says which compute capabilities a backend is for. What its argument checks
and kernels ask for besides comes up only when they are called: `SPECS` holds that, each number
read from the source of FlashInfer 0.6.4 and 0.7.2.

FlashInfer is imported on first use (seconds); a failing import is a reason, not an error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...problem import Problem


@dataclass(frozen=True, slots=True)
class ShapeLimits:
    """What one kernel family takes.

    k_step        each format it computes, and what k must be a multiple of in it
    n_step        what n must be a multiple of
    cuda          the lowest CUDA version of each format, where there is one
    max_elements  of A, B and the output, each
    """

    k_step: Mapping[str, int]
    n_step: int = 1
    out_dtypes: tuple[str, ...] = ("bf16", "fp16")
    m_min: int = 0
    m_max: int | None = None
    max_elements: int | None = None
    cuda: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def reason(self, name: str, p: Problem) -> str | None:
        """Why `p` is outside, in one sentence."""
        if p.format not in self.k_step:
            return f"{name} computes {' and '.join(self.k_step)} only, not {p.format}"
        if p.out_dtype not in self.out_dtypes:
            return f"{name} writes {' and '.join(self.out_dtypes)} only, not {p.out_dtype}"
        for letter, value, step in (("n", p.n, self.n_step), ("k", p.k, self.k_step[p.format])):
            if value % step:
                return f"{name} needs {letter} to be a multiple of {step}, and it is {value}"
        if self.m_max is not None and p.m > self.m_max:
            return f"{name} serves m up to {self.m_max}, not {p.m}"
        if p.m < self.m_min:
            return f"{name} needs m to be at least {self.m_min}, and it is {p.m}"
        largest = max(p.m * p.k, p.n * p.k, p.m * p.n)
        if self.max_elements is not None and largest > self.max_elements:
            return f"{name} indexes in 32 bits, and a matrix here has {largest} elements"
        return None


@dataclass(frozen=True, slots=True)
class MmFp4Kernel:
    """One `mm_fp4` backend: its name there and its limits by compute capability.

    `limits` maps the major compute capability to limits, None to those of every other.
    """

    api: str
    limits: dict[int | None, ShapeLimits]
    layout: str = "swizzled"
    needs: str | None = None
    """``cudnn`` or ``cute-dsl``, where a further package must be installed."""
    per_token: bool = False
    """Whether alpha must be a vector of one factor per row of the activation."""
    distributions: tuple[str, ...] = ()


_DSL = ("nvidia-cutlass-dsl",)

SPECS: dict[str, MmFp4Kernel] = {
    # SM10x and SM11x: the host code checks n % 32 and k % 32. SM12x has no check; its kernels
    # load 16 bytes of k (32 codes) and store 16 bytes of n (8 outputs) at a time.
    "flashinfer-cutlass": MmFp4Kernel(
        "cutlass",
        {None: ShapeLimits({"nvfp4": 32}, n_step=32), 12: ShapeLimits({"nvfp4": 32}, n_step=8)},
    ),
    # cuDNN decides for itself when it builds a plan.
    "flashinfer-cudnn": MmFp4Kernel(
        "cudnn",
        {None: ShapeLimits({"nvfp4": 16, "mxfp4": 32})},
        needs="cudnn",
        distributions=("nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    ),
    # The weight shuffle works on 128 rows.
    "flashinfer-trtllm": MmFp4Kernel(
        "trtllm",
        {None: ShapeLimits({"nvfp4": 16}, n_step=128, out_dtypes=("bf16",))},
        layout="shuffled",
        distributions=("flashinfer-cubin",),
    ),
    "flashinfer-cute-dsl": MmFp4Kernel(
        "cute-dsl",
        {
            None: ShapeLimits({"nvfp4": 32, "mxfp4": 32}, n_step=8),
            12: ShapeLimits(
                {"nvfp4": 64},
                n_step=64,
                out_dtypes=("bf16",),
                m_min=1,
                max_elements=2**31 - 1,
                cuda={"nvfp4": (13, 0)},
            ),
        },
        needs="cute-dsl",
        distributions=_DSL,
    ),
    "flashinfer-cutedsl-low-latency": MmFp4Kernel(
        "cutedsl_low_latency",
        {None: ShapeLimits({"nvfp4": 64, "mxfp4": 128}, m_max=8)},
        needs="cute-dsl",
        distributions=_DSL,
    ),
    "flashinfer-b12x": MmFp4Kernel(
        "b12x",
        {None: ShapeLimits({"nvfp4": 32, "mxfp4": 32}, cuda={"nvfp4": (12, 9), "mxfp4": (13, 0)})},
        needs="cute-dsl",
        distributions=_DSL,
    ),
    "flashinfer-cake": MmFp4Kernel(
        "cake", {None: ShapeLimits({"nvfp4": 256}, n_step=8)}, per_token=True
    ),
}


class Unavailable(RuntimeError):
    """FlashInfer cannot be used in this process; the message is one sentence."""


@functools.cache
def _import_outcome() -> Any:
    """`mm_fp4`, or the `Unavailable` that says why not. Asked once: neither changes."""
    if importlib.util.find_spec("flashinfer") is None:
        return Unavailable("FlashInfer is not installed")
    try:
        function = importlib.import_module("flashinfer.gemm").mm_fp4
        if not callable(function.is_backend_supported):
            raise AttributeError("mm_fp4.is_backend_supported")
    except AttributeError as error:
        return Unavailable(f"this FlashInfer is too old: it has no {error}")
    except OSError as error:
        return Unavailable(
            f"importing FlashInfer failed ({error}); it needs a writable folder, which "
            "FLASHINFER_WORKSPACE_BASE may name"
        )
    except Exception as error:  # whatever its own dependencies raise
        return Unavailable(f"importing FlashInfer failed ({type(error).__name__}: {error})")
    return function


def mm_fp4() -> Any:
    """FlashInfer's function. Raises Unavailable, one sentence, where it cannot be imported."""
    outcome = _import_outcome()
    if isinstance(outcome, Unavailable):
        raise Unavailable(*outcome.args)
    return outcome


def version() -> str:
    """The installed FlashInfer's version."""
    return str(getattr(importlib.import_module("flashinfer"), "__version__", "?"))


def installed() -> list[str]:
    """The backends the installed `mm_fp4` lists in its signature, ``auto`` left out.

    One that is not in `SPECS` is newer than this module. Raises Unavailable.
    """
    signature = inspect.signature(mm_fp4(), eval_str=True)
    names = typing.get_args(signature.parameters["backend"].annotation)
    return sorted(name for name in names if name != "auto")


def supported_sms(api: str) -> list[int]:
    """The compute capabilities FlashInfer's table has for a backend of `mm_fp4`."""
    function = mm_fp4()
    return [sm for sm in range(70, 200) if function.is_backend_supported(api, sm)]


def unsupported_sm(name: str, sm: int) -> str | None:
    """Why FlashInfer does not run backend `name` on a compute capability, from its own table."""
    api = SPECS[name].api
    sms = supported_sms(api)
    if sm in sms:
        return None
    if not sms:
        has = ", ".join(a for a in installed() if supported_sms(a))
        return f"FlashInfer {version()} has no mm_fp4 backend {api} (it has {has})"
    listed = ", ".join(str(s) for s in sms)
    return f"FlashInfer {version()} runs {api} on SM {listed}, not on SM {sm}"


def limits(name: str, sm: int) -> ShapeLimits:
    """The limits of backend `name` on a compute capability."""
    by_major = SPECS[name].limits
    return by_major.get(sm // 10, by_major[None])


def _cuda_version() -> tuple[int, ...]:
    """The CUDA version FlashInfer compiles with, as it finds out itself; () if it finds none."""
    try:
        found = importlib.import_module("flashinfer.gemm.gemm_base").get_cuda_version()
    except Exception:  # it raises RuntimeError without nvcc, and moved between versions
        return ()
    return tuple(int(part) for part in str(found).split(".")[:2])


def missing(name: str, problem: Problem, sm: int) -> str | None:
    """A dependency of the backend that this environment lacks."""
    spec = SPECS[name]
    if spec.needs == "cute-dsl" and importlib.util.find_spec("cutlass") is None:
        return f"{name} needs the nvidia-cutlass-dsl package, which is not installed"
    if spec.needs == "cudnn":
        return _missing_cudnn(name, problem, sm)
    lowest = limits(name, sm).cuda.get(problem.format)
    if lowest and _cuda_version() < lowest:
        found = ".".join(map(str, _cuda_version())) or "none"
        wanted = ".".join(map(str, lowest))
        return f"{name} needs CUDA {wanted} for {problem.format} on SM {sm}, and finds {found}"
    return None


def _missing_cudnn(name: str, problem: Problem, sm: int) -> str | None:
    needed = 91400 if problem.format == "mxfp4" and sm // 10 == 12 else 91002
    return cudnn_version(name, needed, sm)


def cudnn_version(name: str, needed: int, sm: int) -> str | None:
    """Why there is no cuDNN of version `needed` (9.23.1 is 92301) here, in one sentence."""
    try:
        found = int(importlib.import_module("cudnn").backend_version())
    except Exception as error:  # ImportError, or RuntimeError without libcudnn
        return f"{name} needs nvidia-cudnn-frontend and a cuDNN library ({error})"
    if found < needed:
        return f"{name} needs cuDNN {_dotted(needed)} on SM {sm}, and has {_dotted(found)}"
    return None


def _dotted(cudnn: int) -> str:
    return f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"


def unsupported(name: str, problem: Problem, sm: int) -> str | None:
    """Why backend `name` cannot run `problem` on a compute capability, in one sentence.

    FlashInfer's table first, then its limits, then what is not installed. Needs no GPU.
    """
    try:
        return (
            unsupported_sm(name, sm)
            or limits(name, sm).reason(name, problem)
            or missing(name, problem, sm)
        )
    except Unavailable as error:
        return str(error)
