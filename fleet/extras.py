"""The libraries of the extras ``fp4tune[fleet]`` and ``fp4tune[ray]``, and one sentence without."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import Refused


def need(module: str, extra: str = "fleet") -> Any:
    """Import `module`. Raises Refused, saying what to install, where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise Refused(f"this needs {name}: pip install 'fp4tune[{extra}]'") from None
