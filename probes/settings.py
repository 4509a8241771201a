"""Variables of fp4tune's own, as code that runs in a worker reads them.

A worker's environment does not name fp4tune, so that a backend cannot tell from it that it is
tested. What a worker needs of those variables it is told by the probe, and `value` finds there;
anywhere else `value` reads the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_told: dict[str, str] = {}


def value(name: str) -> str | None:
    """The value of the variable `name`, None where it is not set."""
    return os.environ.get(name, _told.get(name))


def told() -> dict[str, str]:
    """What this process was told, for one that it starts in turn."""
    return dict(_told)


def tell(variables: Mapping[str, str]) -> None:
    """Have `value` know these in this process."""
    _told.clear()
    _told.update(variables)
