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
    rate: float | None = None
    """The failure rate that every kernel's regimes are to be bounded by; None for none."""
    without: tuple[str, ...] = ()
    """Regimes left out: where one is required, the verdict is safe under a condition at best."""


_STRESS = (
    "mlp-chain",
    "rewrite",
    "padding",
    "strided",
    "off-bucket",
    "history",
    "scratch",
    "churn",
    "regrow",
    "threads",
    "neighbours",
    "huge",
)


LEVELS = {
    level.name: level
    for level in (
        Level("quick", ragged=2, least=3, most=20, seconds=0.1, samples=5, without=_STRESS),
        Level("standard", ragged=3, least=4, most=100, seconds=0.25, samples=9, without=("huge",)),
        Level("soak", ragged=5, least=50, most=10_000, seconds=10.0, samples=15, rate=1e-4),
    )
}
