"""What a GPU says of itself while it is measured: clocks, throttling, temperature, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .devices import Target

# Clock limits that make a time say more about the moment than about the kernel.
_SLOWED = ("SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "SwPowerCap")


def health(target: Target) -> dict[str, Any]:
    """A snapshot by NVML; empty for a CPU or without NVML. A fact that cannot be asked is None.

    Keys: sm_mhz, memory_mhz, temperature_c, power_w, slowed (names of active slowdowns), ecc
    (uncorrected errors since the driver was loaded).
    """
    if target.uuid is None:
        return {}
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:
        return {}
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(target.uuid)

        def ask(question: Callable[[], Any]) -> Any:
            try:
                return question()
            except nvml.NVMLError:
                return None

        reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        power = ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return {
            "sm_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "temperature_c": ask(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            "power_w": None if power is None else power / 1000,
            "slowed": None if reasons is None else _slowed(nvml, reasons),
            "ecc": ask(
                lambda: nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            ),
        }
    except nvml.NVMLError:
        return {}
    finally:
        nvml.nvmlShutdown()


def _slowed(nvml: Any, reasons: int) -> list[str]:
    names = {name: getattr(nvml, f"nvmlClocksThrottleReason{name}", 0) for name in _SLOWED}
    return [name for name, bit in names.items() if reasons & bit]
