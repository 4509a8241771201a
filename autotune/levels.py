"""How much is done: the three levels, in launches and seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Level:
    """What a level spends on each (backend, layer)."""

    name: str
    ragged: int
    """Different m's per bucket, both edges among them."""
    least: int
    """Fewest repeats of a regime's chain."""
    most: int
    seconds: float
    """Time for the repeats of one regime; fewest repeats come first."""
    samples: int
    """Timing samples of each candidate in each bucket."""


LEVELS = {
    level.name: level
    for level in (
        Level("quick", ragged=2, least=3, most=20, seconds=0.1, samples=5),
        Level("standard", ragged=3, least=4, most=100, seconds=0.25, samples=9),
        Level("soak", ragged=5, least=50, most=10_000, seconds=10.0, samples=15),
    )
}
