"""How much is done: the three levels, in launches and seconds.

A fault in one of 10,000 launches is missed by 30,000 with less than 5 %. A CPU does not come so far
in a time that anybody waits: there a level is a time, and what it reached is told.
"""

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
    long: bool
    """Whether what takes seconds whatever the rest is done: pauses between calls, and the first
    calls of a process of their own."""
    samples: int
    """Timing samples of each candidate in each bucket."""
    launches: int = 0
    """Checked launches of a kernel that is chosen, in each required regime that waits for chance;
    a tenth in those that do not, and of one that is second."""
    share: float = 0.0
    """Seconds of the device that each of these may take; what is slower reaches less."""
    on_cpu: float = 0.0
    """Seconds for all layers on a CPU, shared evenly among what is to be proven; what has to be
    done of each anyway may take longer."""
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
    "shared-expert",
    "threads",
    "neighbours",
    "huge",
)


LEVELS = {
    level.name: level
    for level in (
        Level(
            "quick",
            ragged=2,
            least=3,
            most=20,
            seconds=0.1,
            long=False,
            samples=5,
            launches=3_000,
            share=0.025,
            on_cpu=20.0,
            without=_STRESS,
        ),
        Level(
            "standard",
            ragged=3,
            least=4,
            most=100,
            seconds=0.1,
            long=True,
            samples=9,
            launches=30_000,
            share=0.25,
            on_cpu=120.0,
            without=("huge",),
        ),
        Level(
            "soak",
            ragged=5,
            least=50,
            most=10_000,
            seconds=1.0,
            long=True,
            samples=15,
            launches=3_000_000,
            share=25.0,
            on_cpu=12_000.0,
        ),
    )
}
