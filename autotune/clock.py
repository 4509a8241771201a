"""Where a probe's time goes: seconds by layer and step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall seconds by step of one layer.

    Steps with a backend's name run beside those of other backends inside the step of that name
    without one, so they add up to more than it took.
    """

    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    @contextmanager
    def spent(self, step: str, backend: str = "") -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            with self.lock:
                took = time.monotonic() - start
                self.seconds[step, backend] = self.seconds.get((step, backend), 0.0) + took

    def rows(self, n: int, k: int) -> list[dict[str, object]]:
        """One row a step, longest first."""
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return [
            {"n": n, "k": k, "step": step, "backend": backend or None, "seconds": round(took, 2)}
            for (step, backend), took in ordered
        ]
