"""An object that stands where one of a library's functions did."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class StandIn:
    """What takes a function's place; every attribute is the original's.

    FlashInfer keeps what it decided on the function itself, so reading and setting go there. Each
    has a class of its own, whose ``__call__`` is a function: an instance is then called as quickly
    as one.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        object.__setattr__(self, "_fp4tune_original", original)
        object.__setattr__(self, "__doc__", original.__doc__)
        object.__setattr__(self, "__signature__", inspect.signature(original))

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_fp4tune_original"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._fp4tune_original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._fp4tune_original, name)
