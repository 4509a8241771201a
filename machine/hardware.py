"""What the hardware says of itself, through NVML for a GPU and /proc for a CPU. Never raises."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

CPU_FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)
"""Instruction sets that a matrix product may choose its code by."""

IDENTITY = ("uuid", "nvml_index", "nvml")
"""Keys that say which device this is or how it was asked, not what evidence depends on."""


def hardware(which: int | str | None, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Facts of a GPU, or of the CPU for None.

    `which` is a GPU's UUID (with or without ``GPU-``; best, since CUDA and NVML number GPUs
    differently), or its CUDA index, which is looked up in CUDA_VISIBLE_DEVICES and then taken as
    NVML's. A fact that cannot be asked is None; without NVML the only facts are ``kind`` and
    ``nvml``, the reason.

    Keys of a GPU: kind, nvml (``ok`` or why not), nvml_index, uuid, gpu (the model), driver,
    memory_bytes, mig, ecc, power_cap_w, compute_mode, mps.
    """
    env = os.environ if environ is None else environ
    return cpu() if which is None else _gpu(which, env)


def cpu() -> dict[str, Any]:
    """Keys: kind, cpu (the model), flags (those of CPU_FLAGS, sorted), cores, machine."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "kind": "cpu",
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "flags": sorted(flags.intersection(CPU_FLAGS)),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip() and found:
                    break
                key, _, value = line.partition(":")
                found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return found


def _gpu(which: int | str, environ: Mapping[str, str]) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": "cuda"}
    try:
        import pynvml  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        return {**facts, "nvml": "the module pynvml (nvidia-ml-py) is not installed"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {**facts, "nvml": f"NVML cannot be used: {error}"}
    try:
        handle, index = _handle(pynvml, which, environ)
        return {**facts, "nvml": "ok", "nvml_index": index, **_facts(pynvml, handle, environ)}
    except (pynvml.NVMLError, LookupError, ValueError) as error:
        return {**facts, "nvml": f"NVML does not know GPU {which}: {error}"}
    finally:
        pynvml.nvmlShutdown()


def _handle(pynvml: Any, which: int | str, environ: Mapping[str, str]) -> tuple[Any, int | None]:
    selector = which if isinstance(which, str) else _visible(which, environ)
    if isinstance(selector, str) and selector.startswith("MIG-"):
        return pynvml.nvmlDeviceGetHandleByUUID(selector), None
    if isinstance(selector, int):
        return pynvml.nvmlDeviceGetHandleByIndex(selector), selector
    plain = selector.removeprefix("GPU-")
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        # CUDA_VISIBLE_DEVICES takes the beginning of a UUID, too.
        if _text(pynvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-").startswith(plain):
            return handle, index
    raise LookupError("no GPU has this UUID")


def _visible(index: int, environ: Mapping[str, str]) -> int | str:
    """What CUDA's `index` stands for under CUDA_VISIBLE_DEVICES: an NVML index or a UUID."""
    named = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if named == [""]:
        return index
    chosen = named[index]
    return int(chosen) if chosen.isdigit() else chosen


def _facts(pynvml: Any, handle: Any, environ: Mapping[str, str]) -> dict[str, Any]:
    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (pynvml.NVMLError, AttributeError):
            return None  # the GPU does not have it, or the driver or pynvml is too old to say

    return {
        "uuid": ask(lambda: _text(pynvml.nvmlDeviceGetUUID(handle))),
        "gpu": ask(lambda: _text(pynvml.nvmlDeviceGetName(handle))),
        "driver": ask(lambda: _text(pynvml.nvmlSystemGetDriverVersion())),
        "memory_bytes": ask(lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)),
        "mig": ask(lambda: bool(pynvml.nvmlDeviceGetMigMode(handle)[0])),
        "ecc": ask(lambda: bool(pynvml.nvmlDeviceGetEccMode(handle)[0])),
        "power_cap_w": ask(lambda: pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000),
        "compute_mode": ask(lambda: int(pynvml.nvmlDeviceGetComputeMode(handle))),
        "mps": _mps(environ),
    }


def _mps(environ: Mapping[str, str]) -> bool:
    """Whether CUDA programs started here would go through an MPS server."""
    pipe = environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return os.path.exists(os.path.join(pipe, "control"))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
