"""The two copies that end each chain: one waits for the kernel before it, and one does not."""

from __future__ import annotations

import torch

from ...check.sweep import Checker, slot
from .adversaries import Adversary
from .chain import DelayClock, Move, Step

_SHAPE = (64, 512)
_COPY = 1024


class PairOfCopies:
    """How often the two were flagged, and how often they started before they might."""

    def __init__(self, kind: str, device: torch.device, dtype: torch.dtype) -> None:
        self._kind = kind
        self.device = device
        generator = torch.Generator(device=device).manual_seed(0)
        self._source = torch.randint(1, 255, _SHAPE, device=device, generator=generator).to(dtype)
        self._began = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)]
        self._overlaps = torch.zeros(2, dtype=torch.int64, device=device)
        # The good one, then the bad one: last, where a slow host would be noticed.
        self.steps = tuple(self._step(waits) for waits in (True, False))
        self._checker = Checker([slot for step in self.steps for slot in step.slots])
        for step in self.steps:
            step.enqueue()  # compiled before any clock runs

    def _step(self, waits: bool) -> Step:
        from . import _adversary_triton as kernels

        place = slot(self._source, self._source)
        moves: tuple[Move, ...] = ()
        read = self._source
        if self._kind == "raw":
            read = torch.empty_like(self._source)
            moves = ((self._source, read),)
        began = self._began[0 if waits else 1]
        size = self._source.numel()

        def enqueue() -> None:
            kernels.control[(-(-size // _COPY),)](
                read.view(torch.int16),
                place.out.view(torch.int16),
                size,
                began,
                WAIT=waits,
                BLOCK=_COPY,
                launch_pdl=True,
            )

        return Step(enqueue, (place,), moves)

    def join(self, clock: DelayClock, first: int) -> Adversary:
        """The adversary in front of both, which are steps `first` and the next of the chain."""
        self._clock = clock
        self._adversary = Adversary(self._kind, self.steps, clock, self.device, first)
        self._span = slice(first, first + 2)
        self._adversary.clear()
        self._adversary.strike(0)
        self._adversary.clear()
        return self._adversary

    def check(self) -> None:
        """Check both, and note whether each started before its adversary's delay was over."""
        self._checker.sweep()
        self._overlaps += torch.cat(self._began) < self._clock.over(self._span)

    def totals(self) -> tuple[int, ...]:
        """Rounds so far; those in which the good and the bad control were flagged; in which they
        started early. Waits for the device."""
        flagged = [
            max(report.bad_launches, self._adversary.early(place)[1], int(report.guard > 0))
            for place, report in enumerate(self._checker.reports())
        ]
        return (self._checker.sweeps, *flagged, *self._overlaps.tolist())
