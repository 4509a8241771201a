"""The device's primary context, current in the thread that calls.

Triton encodes tensor maps before it looks for a context to launch in, and the driver encodes them
in a thread's current one only. A thread that has not called the CUDA runtime yet has none: the
first call that it makes would raise "invalid device context".
"""

from __future__ import annotations

import ctypes
import threading

DRIVER = "libcuda.so.1"
_seen = threading.local()


def ensure_current(index: int) -> None:
    """Make the primary context of device `index` current in this thread, where it has none.

    Enqueues nothing, so it may be called while a stream is captured. Raises RuntimeError.
    """
    if getattr(_seen, "done", False):
        return
    driver = ctypes.CDLL(DRIVER)
    context, device = ctypes.c_void_p(), ctypes.c_int()
    _raise_for(driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        _raise_for(driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
        # Never released: it lives as long as the process does, with torch's own use of it.
        retained = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        _raise_for(retained, "cuDevicePrimaryCtxRetain")
        _raise_for(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _seen.done = True


def _raise_for(result: int, what: str) -> None:
    if result:
        raise RuntimeError(f"{what} failed with CUDA error {result}")
