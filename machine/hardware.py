"""What the hardware says of itself, through NVML for a GPU and /proc for a CPU."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from . import driver, visible

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

    `which` is a GPU's or a MIG instance's UUID (with or without ``GPU-``; best, since CUDA and NVML
    number GPUs differently), or the index that CUDA gives it under CUDA_VISIBLE_DEVICES. A fact
    that cannot be asked is None; without NVML the only facts are ``kind`` and ``nvml``, the reason.
    Raises DriverSilent, and nothing else.

    Keys of a GPU: kind, nvml (``ok`` or why not), nvml_index, uuid, gpu (the model), driver,
    memory_bytes, mig, ecc, power_cap_w, compute_mode, mps.
    """
    env = os.environ if environ is None else environ
    return cpu() if which is None else _gpu_facts(which, env)


def cpu() -> dict[str, Any]:
    """Keys: kind, cpu (the model), flags (those of CPU_FLAGS, sorted), cores, machine."""
    info = _cpuinfo()  # psutil does not tell the instruction sets
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "kind": "cpu",
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "flags": sorted(flags.intersection(CPU_FLAGS)),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
    }


def cpu_name() -> str:
    """The CPU's model, or ``CPU`` where the system does not tell."""
    return _cpuinfo().get("model name") or "CPU"


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


def _gpu_facts(which: int | str, environ: Mapping[str, str]) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": "cuda"}
    try:
        node = visible.node(driver.ask("gpus"))
        uuid = _uuid(node, which, environ)
        if uuid is None:
            return {**facts, "nvml": f"NVML does not know GPU {which}: none here is called so"}
        found = driver.ask("facts", uuid)
    except driver.NvmlError as error:
        if error.kind in ("absent", "unusable"):
            return {**facts, "nvml": str(error)}
        return {**facts, "nvml": f"NVML does not know GPU {which}: {error}"}
    index = next((i for i, gpu in enumerate(node) if gpu.uuid == uuid), None)
    return {**of_answer(found, environ), "nvml_index": index}


def of_answer(answer: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The facts of a GPU from what the driver answers to ``facts`` (`nvml.facts`)."""
    return {"kind": "cuda", "nvml": "ok", **answer, "mps": _mps(environ)}


def _uuid(
    node: Sequence[visible.NodeGpu], which: int | str, environ: Mapping[str, str]
) -> str | None:
    """The UUID that `which` stands for: as the one entry of a list, or the index in CUDA's."""
    if isinstance(which, int):
        seen = visible.seen(node, environ).devices
        return seen[which][0] if 0 <= which < len(seen) else None
    return visible.named(node, which)


def _mps(environ: Mapping[str, str]) -> bool:
    """Whether CUDA programs started here would go through an MPS server."""
    pipe = environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return os.path.exists(os.path.join(pipe, "control"))
