"""What a GPU says of itself while it is measured: clocks, throttling, temperature, errors."""

from __future__ import annotations

from typing import Any

from . import driver
from .devices import Target


def health(target: Target) -> dict[str, Any]:
    """A snapshot by NVML; empty for a CPU, or where NVML does not tell. A fact that cannot be asked
    is None.

    Keys: sm_mhz, memory_mhz, temperature_c, power_w, slowed (names of active slowdowns), ecc
    (uncorrected errors since the driver was loaded). Raises DriverSilent.
    """
    if target.uuid is None:
        return {}
    try:
        found: dict[str, Any] = driver.ask("health", target.uuid)
        return found
    except driver.NvmlError:
        return {}
