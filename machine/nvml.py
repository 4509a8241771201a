"""The one reader of NVML: a program that asks the driver, in a process that may hang alone.

It reads one question a line from standard input and answers each with one line of JSON; it ends
when standard input does. `driver` starts it, and nothing imports it: it is run by its path, in
Python's isolated mode, with the caller's ``sys.path`` as its only argument. So it imports the
standard library and pynvml alone.

A question is ``{"id": ..., "ask": ..., "gpu": ...}``, an answer ``{"id": ..., "answer": ...}`` or
``{"id": ..., "error": ..., "kind": ...}``. `Unasked` has the kinds of errors, `QUESTIONS` what can
be asked; `gpu` is a UUID as NVML prints it, of a GPU or of a MIG instance."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

EVENTS = {
    "xid": "nvmlEventTypeXidCriticalError",
    "ecc": "nvmlEventTypeDoubleBitEccError",
    "mig": "nvmlEventMigConfigChange",
    "unavailable": "nvmlEventTypeGpuUnavailableError",
    "recovery": "nvmlEventTypeGpuRecoveryAction",
}
"""Kind of event to NVML's name of it; what this driver or library lacks is not listened for."""
MOST_EVENTS = 64
"""Events in one answer; the rest come with the next."""

SLOWDOWNS = ("SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "SwPowerCap")
"""Clock limits that make a time say more about the moment than about the kernel."""

nvml: Any = None
"""The module pynvml, once `_begin` has imported it and NVML is initialised."""
_listening: dict[str, tuple[Any, dict[int, str]]] = {}
"""UUID to its event set (None where the GPU has no events) and the kinds in it by their bits."""


class Unasked(Exception):
    """A question that NVML was not asked, for the reason given.

    `kind` is ``absent`` where there is no pynvml, ``unusable`` where NVML does not begin, as
    without a driver, ``refused`` where it failed later, ``unknown`` where it has no such GPU.
    """

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def gpus(_: str | None) -> list[dict[str, Any]]:
    """Every GPU in NVML's order: uuid, name, sm (90, 120), bus (its PCI address), and mig: None
    where MIG is off, else the uuid and name of each instance."""
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        place = _nvml_answer("nvmlDeviceGetPciInfo", handle)
        found.append(
            {
                "uuid": _decoded_string(nvml.nvmlDeviceGetUUID(handle)),
                "name": _decoded_string(nvml.nvmlDeviceGetName(handle)),
                "sm": 10 * major + minor,
                "bus": None if place is None else _decoded_string(place.busId),
                "mig": _mig_instances(handle),
            }
        )
    return found


def facts(gpu: str | None) -> dict[str, Any]:
    """What evidence of a GPU depends on: uuid, gpu (the model), driver, memory_bytes, mig, ecc,
    power_cap_w, compute_mode. A fact that cannot be asked is None."""
    own, whole = _handles(gpu)
    memory = _nvml_answer("nvmlDeviceGetMemoryInfo", own)
    mig, ecc = (
        _nvml_answer("nvmlDeviceGetMigMode", whole),
        _nvml_answer("nvmlDeviceGetEccMode", whole),
    )
    power = _nvml_answer("nvmlDeviceGetPowerManagementLimit", whole)
    compute = _nvml_answer("nvmlDeviceGetComputeMode", whole)
    return {
        "uuid": _decoded_string(_nvml_answer("nvmlDeviceGetUUID", own)),
        "gpu": _decoded_string(_nvml_answer("nvmlDeviceGetName", own)),
        "driver": _decoded_string(_nvml_answer("nvmlSystemGetDriverVersion")),
        "memory_bytes": None if memory is None else int(memory.total),
        "mig": None if mig is None else bool(mig[0]),
        "ecc": None if ecc is None else bool(ecc[0]),
        "power_cap_w": None if power is None else power / 1000,
        "compute_mode": None if compute is None else int(compute),
    }


def health(gpu: str | None) -> dict[str, Any]:
    """How a GPU is at this moment: sm_mhz, memory_mhz, temperature_c, power_w, slowed (names of
    active `SLOWDOWNS`), ecc (uncorrected errors since the driver was loaded)."""
    _, whole = _handles(gpu)
    reasons = _nvml_answer("nvmlDeviceGetCurrentClocksThrottleReasons", whole)
    power = _nvml_answer("nvmlDeviceGetPowerUsage", whole)
    bits = {name: getattr(nvml, f"nvmlClocksThrottleReason{name}", 0) for name in SLOWDOWNS}
    slowed = [name for name, bit in bits.items() if (reasons or 0) & bit]
    return {
        "sm_mhz": _nvml_answer("nvmlDeviceGetClockInfo", whole, nvml.NVML_CLOCK_SM),
        "memory_mhz": _nvml_answer("nvmlDeviceGetClockInfo", whole, nvml.NVML_CLOCK_MEM),
        "temperature_c": _nvml_answer("nvmlDeviceGetTemperature", whole, nvml.NVML_TEMPERATURE_GPU),
        "power_w": None if power is None else power / 1000,
        "slowed": None if reasons is None else slowed,
        "ecc": _nvml_answer("nvmlDeviceGetTotalEccErrors", whole, *_uncorrected()),
    }


def look(gpu: str | None) -> dict[str, Any]:
    """What a daemon watches: processes (numbers of those that compute on it), utilisation
    (percent), memory_used (bytes), ecc as in `health`, and events (kind, data) since the last look.

    Unlike the other answers it fails where the GPU does: a lost GPU is an error, not a None.
    """
    own, whole = _handles(gpu)
    memory = _supported(nvml.nvmlDeviceGetMemoryInfo, own)
    processes = _supported(nvml.nvmlDeviceGetComputeRunningProcesses, own) or []
    rates = _supported(nvml.nvmlDeviceGetUtilizationRates, whole)
    return {
        "processes": [int(process.pid) for process in processes],
        "utilisation": None if rates is None else int(rates.gpu),
        "memory_used": None if memory is None else int(memory.used),
        "ecc": _supported(nvml.nvmlDeviceGetTotalEccErrors, whole, *_uncorrected()),
        "events": _events(str(gpu), whole),
    }


QUESTIONS: dict[str, Callable[[str | None], Any]] = {
    "gpus": gpus,
    "facts": facts,
    "health": health,
    "look": look,
}


def _begin() -> None:
    """Load and initialise NVML, once. Raises Unasked."""
    global nvml
    if nvml is not None:
        return
    try:
        import pynvml
    except ImportError:
        why = "the module pynvml (nvidia-ml-py) is not installed"
        raise Unasked("absent", why) from None
    try:
        pynvml.nvmlInit()
    except Exception as error:  # a library of another make fails in ways of its own
        raise Unasked("unusable", f"NVML cannot be used: {error}") from None
    nvml = pynvml


def _handles(gpu: str | None) -> tuple[Any, Any]:
    """NVML's handle of this UUID, and of the whole GPU that it is a part of. Raises Unasked."""
    try:
        own = nvml.nvmlDeviceGetHandleByUUID(gpu)
    except nvml.NVMLError as by_uuid:
        own = _handle_by_place(str(gpu))
        if own is None:
            lost = isinstance(by_uuid, nvml.NVMLError_GpuIsLost)
            raise Unasked("refused" if lost else "unknown", _error_and_type(by_uuid)) from None
    if not str(gpu).startswith("MIG-"):
        return own, own
    whole = _nvml_answer("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", own)
    return own, own if whole is None else whole


def _handle_by_place(gpu: str) -> Any:
    """The handle of a GPU by its place among all, for a driver that finds none by its UUID."""
    for index in range(_nvml_answer("nvmlDeviceGetCount") or 0):
        handle = _nvml_answer("nvmlDeviceGetHandleByIndex", index)
        if handle is not None and _decoded_string(_nvml_answer("nvmlDeviceGetUUID", handle)) == gpu:
            return handle
    return None


def _mig_instances(handle: Any) -> list[dict[str, str]] | None:
    """The MIG instances of a GPU in NVML's order; None where MIG is off."""
    mode = _nvml_answer("nvmlDeviceGetMigMode", handle)
    if mode is None or not mode[0]:
        return None
    found = []
    for index in range(_nvml_answer("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        one = _nvml_answer("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
        uuid = None if one is None else _decoded_string(_nvml_answer("nvmlDeviceGetUUID", one))
        if uuid is not None:
            name = _decoded_string(_nvml_answer("nvmlDeviceGetName", one))
            found.append({"uuid": uuid, "name": name or "a MIG instance"})
    return found


def _uncorrected() -> tuple[int, int]:
    """Kind and counter of uncorrected memory errors since the driver was loaded."""
    return nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC


def _events(gpu: str, handle: Any) -> list[dict[str, Any]]:
    """The events of a GPU since the last call; listening begins with the first."""
    if gpu not in _listening:
        _listening[gpu] = _listen(handle)
    events, kinds = _listening[gpu]
    found: list[dict[str, Any]] = []
    while events is not None and len(found) < MOST_EVENTS:
        try:
            data = nvml.nvmlEventSetWait_v2(events, 0)
        except nvml.NVMLError_Timeout:
            break
        kind = kinds.get(data.eventType, "other")
        found.append({"kind": kind, "data": int(data.eventData)})
    return found


def _listen(handle: Any) -> tuple[Any, dict[int, str]]:
    wanted = {getattr(nvml, name, 0): kind for kind, name in EVENTS.items()}
    try:
        supported = nvml.nvmlDeviceGetSupportedEventTypes(handle)
        kinds = {bit: kind for bit, kind in wanted.items() if bit & supported}
        if not kinds:
            return None, {}
        events = nvml.nvmlEventSetCreate()
        nvml.nvmlDeviceRegisterEvents(handle, sum(kinds), events)
        return events, kinds
    except nvml.NVMLError:
        return None, {}


def _nvml_answer(name: str, *arguments: Any) -> Any:
    """The answer of one of NVML's functions, or None: the GPU does not have it, or driver or pynvml
    are too old to say."""
    try:
        return getattr(nvml, name)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def _supported(function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this GPU has none to give; any other error goes on."""
    try:
        return function(*arguments)
    except (
        nvml.NVMLError_NotSupported,
        nvml.NVMLError_FunctionNotFound,
        nvml.NVMLError_NoPermission,
    ):
        return None


def _decoded_string(value: Any) -> Any:
    """A string of NVML's, whose older bindings give bytes; None stays."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _error_and_type(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question, or the error; whatever NVML raises."""
    reply: dict[str, Any] = {"id": question.get("id")}
    try:
        ask = QUESTIONS[question["ask"]]
        _begin()
        reply["answer"] = ask(question.get("gpu"))
    except Unasked as error:
        reply.update(error=str(error), kind=error.kind)
    except Exception as error:
        reply.update(error=_error_and_type(error), kind="refused")
    return reply


def main() -> None:
    """Answer until standard input ends; then end at once, whatever a call to the driver does."""
    sys.path[:] = json.loads(sys.argv[1])
    questions: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def work() -> None:
        try:
            while True:
                reply = json.dumps(answer(json.loads(questions.get()))) + "\n"
                os.write(1, reply.encode())
        finally:
            os._exit(1)  # a caller that is gone, or a question that is none

    threading.Thread(target=work, daemon=True).start()
    for line in sys.stdin.buffer:
        questions.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
