"""What a layer is asked about: a tactic in a range of m."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """A tactic in the m range (lo, hi], the m's to launch there, and the width it is held to."""

    ms: tuple[int, ...]
    tactic: str
    width: int = 24


@dataclass(frozen=True, slots=True)
class LaunchAim:
    """How much a regime is to show of each item.

    `launches` checked, on `problems` different problems; or what `seconds` of the device reach,
    where that is less.
    """

    launches: int
    problems: int
    seconds: float
