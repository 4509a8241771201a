"""Whether a time can be trusted, in a sentence with what to do about it where it cannot."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CLOCK = 0.02
"""A share by which the clock may change while a layer is timed before it is worth a word."""
EVERY = 0.5
"""Seconds between two looks at the device."""

Snapshot = Mapping[str, Any]


@dataclass(slots=True)
class Watch:
    """Looks at a device while it is timed: `ask` is what it says of itself (`probes.health`)."""

    ask: Callable[[], Snapshot]
    seen: list[Snapshot] = field(default_factory=list)
    _last: float = field(default=-1e9, repr=False)

    def look(self, now: bool = False) -> None:
        """Ask again, if the last time was a while ago or `now` asks for it."""
        if not now and time.monotonic() - self._last < EVERY:
            return
        if found := self.ask():
            self.seen.append(found)
        self._last = time.monotonic()

    @property
    def device(self) -> dict[str, Any]:
        """The first and the last look, as they are stored with a timing; empty where none was."""
        return {"before": self.seen[0], "after": self.seen[-1]} if self.seen else {}


def unsteady(seen: Sequence[Snapshot]) -> str | None:
    """What a device's clocks did that a time should not rest on, and the remedy; None if nothing.

    `seen` are looks while it was busy.
    """
    reasons = sorted({name for each in seen for name in each.get("slowed") or ()})
    clocks = [mhz for each in seen if (mhz := each.get("sm_mhz"))]
    low, high = min(clocks, default=0), max(clocks, default=0)
    if not reasons and high <= low * (1 + CLOCK):
        return None
    span = [f"SM clock {low} to {high} MHz" if low < high else f"SM clock {low} MHz"]
    what = "held its clock back" if reasons else "changed its clock"
    return (
        f"the GPU {what} ({', '.join([*reasons, *(span if clocks else ())])}) while this layer was "
        "timed: ratios hold, since candidates took turns, but microseconds may not; lock the clock "
        "(nvidia-smi -lgc) or let the GPU cool, and probe --again"
    )


def undecided(rounds: int, margin: float) -> str:
    """What to say of times that are not told apart: after `rounds`, their ratio is known to
    `margin` only."""
    return (
        f"after {rounds} samples in turn the ratio to the fastest is known to +-"
        f"{100 * margin:.1f} % only; stop what else uses the device and probe --again, or take "
        "more samples with --level soak"
    )
