"""Routed experts that are wrong on purpose, one for each class of failure seen in real kernels, and
right ones that look odd. They load by name (``zoo-experts-...``) and are in no ordinary probe."""

from __future__ import annotations

from .hasty import HASTY, Copies
from .mutants import MUTANTS
from .rare import RARE
from .right import RIGHT

__all__ = ["named", "names"]

_WRONG = (*MUTANTS, *RARE, *HASTY)
_EVERYONE = {made.name: made for made in (*_WRONG, *RIGHT, Copies)}


def named(name: str) -> object:
    """A fresh one of the mutants. Raises KeyError."""
    return _EVERYONE[name]()


def names(right: bool, gpu: bool = False) -> list[str]:
    """The right ones, or the wrong ones; with `gpu` those that run on a GPU alone, too."""
    found = [*RIGHT, Copies] if right else list(_WRONG)
    return [made.name for made in found if gpu or not issubclass(made, Copies)]
