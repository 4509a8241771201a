"""A process beside one GPU that asks its driver: one that never answers hangs this process alone.

It prints one JSON document a line: what the GPU is (`facts`), who computes on it, how busy it is,
its uncorrected ECC errors, and the events (XID, ECC, MIG, reset) since the last line. It ends when
its standard input does. ``--list`` prints the GPUs there are, once.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any

from ..machine.hardware import hardware

WANTED = {
    "xid": "nvmlEventTypeXidCriticalError",
    "ecc": "nvmlEventTypeDoubleBitEccError",
    "mig": "nvmlEventMigConfigChange",
    "unavailable": "nvmlEventTypeGpuUnavailableError",
    "recovery": "nvmlEventTypeGpuRecoveryAction",
}
"""Kind of event to NVML's name of it; what this driver or library lacks is not listened for."""
FACTS_EVERY = 30.0
"""Seconds between two full looks at what the GPU is."""


def listing() -> dict[str, Any]:
    """``gpus``: index, uuid, name and arch of each visible one; ``reason`` where there is none."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception as error:
        return {"gpus": [], "reason": f"no NVIDIA driver answers ({error})"}
    found = []
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
            found.append({"uuid": uuid, "name": name, "arch": f"sm{major}{minor}"})
    except nvml.NVMLError as error:
        return {"gpus": found, "reason": f"NVML failed ({error})"}
    finally:
        nvml.nvmlShutdown()
    return {"gpus": found, "reason": None if found else "this machine has no GPU"}


class Watcher:
    """One GPU as NVML shows it. Every method may raise NVMLError, or never come back."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self.nvml = nvml
        self.uuid = uuid
        self.handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._events: Any = None
        self._kinds: dict[int, str] = {}
        self._listen()

    def _listen(self) -> None:
        nvml = self.nvml
        wanted = {getattr(nvml, name, 0): kind for kind, name in WANTED.items()}
        try:
            supported = nvml.nvmlDeviceGetSupportedEventTypes(self.handle)
            self._kinds = {bit: kind for bit, kind in wanted.items() if bit & supported}
            if self._kinds:
                self._events = nvml.nvmlEventSetCreate()
                nvml.nvmlDeviceRegisterEvents(self.handle, sum(self._kinds), self._events)
        except nvml.NVMLError:
            self._events = None

    def events(self, milliseconds: int) -> list[dict[str, Any]]:
        """Those since the last call; waits up to `milliseconds` for the first."""
        if self._events is None:
            time.sleep(milliseconds / 1000)
            return []
        found: list[dict[str, Any]] = []
        while True:
            try:
                data = self.nvml.nvmlEventSetWait_v2(self._events, 0 if found else milliseconds)
            except self.nvml.NVMLError_Timeout:
                return found
            kind = self._kinds.get(data.eventType, "other")
            found.append({"kind": kind, "data": int(data.eventData)})
            if len(found) >= 64:
                return found

    def look(self) -> dict[str, Any]:
        nvml = self.nvml

        def ask(question: Callable[[], Any]) -> Any:
            try:
                return question()
            except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
                return None
            except nvml.NVMLError_NoPermission:
                return None

        memory = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(self.handle))
        processes = ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(self.handle)) or []
        rates = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(self.handle))
        return {
            "processes": [int(p.pid) for p in processes],
            "utilisation": None if rates is None else int(rates.gpu),
            "memory_used": None if memory is None else int(memory.used),
            "ecc": ask(
                lambda: int(
                    nvml.nvmlDeviceGetTotalEccErrors(
                        self.handle,
                        nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                        nvml.NVML_VOLATILE_ECC,
                    )
                )
            ),
        }


def watch(uuid: str, interval: float) -> None:
    """Print a line every `interval` seconds until standard input ends; a number on it changes
    the interval."""
    watcher: Watcher | None = None
    next_facts = 0.0
    facts: dict[str, Any] = {}
    while True:
        document: dict[str, Any] = {}
        began = time.monotonic()
        try:
            if watcher is None:
                import pynvml

                pynvml.nvmlInit()
                watcher = Watcher(pynvml, uuid)
                next_facts = 0.0
            document = watcher.look()
            document["events"] = watcher.events(0)
            if began >= next_facts or document["events"]:
                facts = hardware(uuid)
                next_facts = began + FACTS_EVERY
            document["facts"] = facts
        except ImportError:
            document = {"error": "the module pynvml (nvidia-ml-py) is not installed"}
        except Exception as error:
            # A lost GPU, a reset, a driver being replaced: begin again with a library loaded anew,
            # which for one that was replaced on the disk takes a new process.
            document = {"error": f"{type(error).__name__}: {error}"}
            _say(document)
            time.sleep(min(interval, 1.0))
            return
        if not _say(document):
            return
        left = interval - (time.monotonic() - began)
        ready, _, _ = select.select([0], [], [], max(0.05, left))
        if ready:
            said = os.read(0, 256)
            if not said:
                return
            try:
                interval = float(said.split()[-1])
            except (ValueError, IndexError):
                continue


def _say(document: dict[str, Any]) -> bool:
    try:
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    if sys.argv[1] == "--list":
        _say(listing())
    else:
        watch(sys.argv[1], float(sys.argv[2]))
