"""Routed experts that are wrong on purpose, one for each class of failure seen in real kernels, and
right ones that look odd. They load by name (``zoo-experts-...``) and are in no ordinary probe."""

from __future__ import annotations

from .mutants import MUTANTS
from .right import RIGHT

__all__ = ["named", "names"]

_EVERYONE = {made.name: made for made in (*MUTANTS, *RIGHT)}


def named(name: str) -> object:
    """A fresh one of the mutants. Raises KeyError."""
    return _EVERYONE[name]()


def names(right: bool) -> list[str]:
    """The right ones, or the wrong ones."""
    return [made.name for made in (RIGHT if right else MUTANTS)]
