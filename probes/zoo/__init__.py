"""Backends that fail on purpose, each by the mechanism of a real failure, and odd right ones.

They show what the prober catches (``fp4tune selftest``). They load by name like any backend, but
belong to no ordinary probe and are never chosen. `floor_table` lists those that a CPU can run,
`host_table` those of what is kept between calls, `gpu_table` those that need a GPU.
"""

from __future__ import annotations

from functools import lru_cache

from ..backends import Backend
from ..backends._returned import Returning
from .mutant import Mutant

__all__ = ["PREFIX", "Mutant", "mutants", "named"]

PREFIX = "zoo-"


@lru_cache(maxsize=1)
def _everyone() -> dict[str, Mutant]:
    from .floor_table import FLOOR
    from .gpu_table import ON_GPU
    from .host_table import HOST

    return {mutant.name: mutant for mutant in (*FLOOR, *HOST, *ON_GPU)}


def mutants(device_kind: str) -> tuple[Mutant, ...]:
    """The mutants that run on a ``cpu`` or a ``cuda`` device, bad ones first."""
    here = [mutant for mutant in _everyone().values() if device_kind in mutant.devices]
    return tuple(sorted(here, key=lambda mutant: mutant.passes))


def named(name: str) -> Backend:
    """A fresh backend of the mutant called `name`. Raises KeyError."""
    backend = _everyone()[name].make(name)
    whole: Backend = backend if hasattr(backend, "run") else Returning(backend)
    return whole
