"""The GPUs of this machine, asked of NVML: a CUDA context in an engine's first process would cost
memory, and break its forks."""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")


def gpus() -> list[tuple[str, str]]:
    """(arch, model name) of every GPU that NVML shows, each once; empty without NVML."""

    def model(nvml: Any, handle: Any) -> tuple[str, str]:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        return f"sm{major}{minor}", _text(nvml.nvmlDeviceGetName(handle))

    return list(dict.fromkeys(_each(model)))


def uuids() -> list[str]:
    """UUIDs of the GPUs that this process may use; empty without NVML.

    As CUDA reads CUDA_VISIBLE_DEVICES: indices or beginnings of UUIDs, to the first that is none.
    """
    found = _each(lambda nvml, handle: _text(nvml.nvmlDeviceGetUUID(handle)))
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


def _each(ask: Callable[[Any, Any], T]) -> list[T]:
    """What ``ask(nvml, handle)`` says of every GPU; empty where NVML fails, or is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return []
    try:
        count = pynvml.nvmlDeviceGetCount()
        return [ask(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    except Exception:
        return []
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()


def _text(said: str | bytes) -> str:
    """A name as NVML's bindings have it; old ones give bytes."""
    return said.decode() if isinstance(said, bytes) else str(said)
