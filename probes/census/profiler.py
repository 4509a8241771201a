"""Kernel names from torch's profiler: what a census falls back to where there is no CUPTI shim."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .kernels import NONE, PROFILER, Census, Kernel

ATTRIBUTES_UNKNOWN = "attributes: unknown (only kernel names were seen)"


def profiled(run: Callable[[], None], why: str) -> Census:
    """Run under torch's profiler. `why` says what keeps CUPTI's callbacks from being used."""
    if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        run()
        torch.cuda.synchronize()
        return Census((), NONE, notes=(why, "this torch has no CUDA profiler"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = [
        Kernel(event.name)
        for event in found.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    if not kernels:
        return Census((), NONE, notes=(why, "torch's profiler saw no kernel"))
    return Census(tuple(kernels), PROFILER, notes=(why, ATTRIBUTES_UNKNOWN))
