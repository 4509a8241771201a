"""CUDA graphs under capture, as a thread that captures nothing must treat them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED."""


@lru_cache(maxsize=1)
def _capture_driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if hasattr(driver, "cuThreadExchangeStreamCaptureMode") else None


@contextmanager
def let_others_capture() -> Iterator[None]:
    """Inside, what this thread asks of CUDA does not spoil a capture that another thread is in.

    A capture in the default mode forbids every thread what might wait (events, allocations) unless
    that thread has said otherwise.
    """
    driver = _capture_driver()
    if driver is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    code = driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        if not code:
            driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
