"""Times of routed experts: each m of an item under the laws that are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from ..launch.timing import Sampler

TIMED_LAWS = ("balanced", "zipf")


@dataclass(frozen=True, slots=True)
class LawBatch:
    """Tokens that are timed under one law: their sampler, and what it `taken`, in microseconds."""

    m: int
    law: str
    tactic: str
    sampler: Sampler
    taken: list[float] = field(default_factory=list)

    @property
    def eager(self) -> Callable[[], None]:
        """All batches once, as they were captured."""
        return self.sampler.eager


@dataclass(frozen=True, slots=True)
class TimedLaws:
    """What is timed of one item: every m under every law, the largest m last."""

    parts: Sequence[LawBatch]

    def host_us(self) -> float:
        """The host's microseconds of a call."""
        return fmean(batch.sampler.host_us or 0.0 for batch in self.parts)

    def sample(self) -> float:
        """Microseconds of a call, the mean over laws and m; kept of each."""
        for batch in self.parts:
            batch.taken.append(batch.sampler.sample())
        return fmean(batch.taken[-1] for batch in self.parts)

    def by_law(self) -> dict[str, list[float]]:
        """The samples so far under each law, each the mean over the m."""
        return {
            law: [
                fmean(now)
                for now in zip(*(b.taken for b in self.parts if b.law == law), strict=True)
            ]
            for law in TIMED_LAWS
        }

    def by_m(self) -> list[tuple[int, float]]:
        """(m, median microseconds, the mean over the laws) of each m that was sampled."""
        return [
            (m, fmean(median(b.taken) for b in self.parts if b.m == m))
            for m in dict.fromkeys(b.m for b in self.parts)
            if all(b.taken for b in self.parts)
        ]
