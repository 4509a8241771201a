"""The GPUs of this machine, asked of NVML: a CUDA context in an engine's first process would cost
memory, and break its forks."""

from __future__ import annotations

import contextlib


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
