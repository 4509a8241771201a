"""The GPUs of this machine, asked of NVML: a CUDA context in an engine's first process would cost
memory, and break its forks."""

from __future__ import annotations

import contextlib
import os


def gpus() -> list[tuple[str, str]]:
    """(arch, model name) of every GPU that NVML shows, each once; empty without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            text = name.decode() if isinstance(name, bytes) else str(name)
            found.append((f"sm{major}{minor}", text))
        return list(dict.fromkeys(found))
    except Exception:
        return []
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()


def uuids() -> list[str]:
    """UUIDs of the GPUs that this process may use; empty without NVML.

    As CUDA reads CUDA_VISIBLE_DEVICES: indices or beginnings of UUIDs, to the first that is none.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))
            found.append(uuid.decode() if isinstance(uuid, bytes) else str(uuid))
    except Exception:
        return []
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    chosen: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdecimal():
            mine = found[int(entry) : int(entry) + 1]
        else:
            mine = [uuid for uuid in found if entry and uuid.startswith(entry)]
        if len(mine) != 1:
            break
        chosen += mine
    return chosen
