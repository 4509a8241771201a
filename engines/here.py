"""The GPUs of this machine, asked of NVML: a CUDA context in an engine's first process would cost
memory, and break its forks."""

from __future__ import annotations

import os

from ..machine import driver, visible


def gpus() -> list[tuple[str, str]]:
    """(arch, model name) of every GPU that NVML shows, each once; empty without NVML.

    Raises DriverSilent.
    """
    return list(dict.fromkeys((f"sm{gpu.sm}", gpu.name) for gpu in _node()))


def uuids() -> list[str]:
    """UUIDs of the GPUs that this process may use; empty without NVML. Raises DriverSilent.

    Of a node where CUDA alone knows which GPU an index means, all of them: what an engine may use
    is held against probes, rather one GPU too many. With a MIG instance, the GPU it is cut from.
    """
    node = _node()
    found = visible.seen(node, os.environ)
    if not found.certain and found.devices:
        return [gpu.uuid for gpu in node]
    return list(
        dict.fromkeys(one for uuid, *_ in found.devices for one in (uuid, _whole(node, uuid)))
    )


def _node() -> tuple[visible.NodeGpu, ...]:
    try:
        return visible.node(driver.ask_once("gpus"))
    except driver.NvmlError:
        return ()


def _whole(node: tuple[visible.NodeGpu, ...], uuid: str) -> str:
    """The UUID of the GPU that holds the MIG instance `uuid`; else `uuid` itself."""
    for gpu in node:
        if any(one.uuid == uuid for one in gpu.instances or ()):
            return gpu.uuid
    return uuid
