"""C++ names as they were written, by the C++ library that is on the node."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _demangler() -> Any:
    try:
        function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
        free = ctypes.CDLL(None).free
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_void_p
    function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    free.argtypes = (ctypes.c_void_p,)
    return function, free


@lru_cache(maxsize=4096)
def demangled(name: str) -> str:
    """A C++ name as it was written; `name` itself where it is none, or nobody here can tell."""
    found = _demangler() if name.startswith("_Z") else None
    if found is None:
        return name
    demangle, free = found
    text = demangle(name.encode(), None, None, None)
    if not text:
        return name
    try:
        return (ctypes.string_at(text)).decode(errors="replace")
    finally:
        free(text)
