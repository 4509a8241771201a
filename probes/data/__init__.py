"""Operands to run problems on: exact problems, and families of realistic and extreme data.

All draws are reproducible: (problem, seed) gives the same bits on every device, and the rows of a
draw do not depend on how many are drawn after them (except through a measured maximum).
"""

from __future__ import annotations

from .exact import WIDTHS, exact, largest_sum, steady
from .families import FAMILIES, Family, draw, families
from .operands import Operands, window

__all__ = [
    "FAMILIES",
    "WIDTHS",
    "Family",
    "Operands",
    "draw",
    "exact",
    "families",
    "largest_sum",
    "steady",
    "window",
]
