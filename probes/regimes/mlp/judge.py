"""Checks the copies that an MLP chain keeps of what each of its stages was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...check.reference import tile_error
from ...check.sweep import POISON, TILE, Checker, Slot, SlotReport

_NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class ByTiles:
    """A slot judged by the relative Frobenius error of its tiles against `ref` (m, n)."""

    slot: Slot
    ref: torch.Tensor
    limit: float


class TileJudge:
    """As `checks.Checker`, but by tiles: for accumulators too narrow for a bound per element."""

    def __init__(self, subjects: Sequence[ByTiles]) -> None:
        self._subjects = tuple(subjects)
        self._bad = [
            torch.zeros(
                -(-s.ref.shape[0] // TILE),
                -(-s.ref.shape[1] // TILE),
                dtype=torch.int64,
                device=s.ref.device,
            )
            for s in subjects
        ]
        self._launches = [bad.new_zeros(()) for bad in self._bad]
        self._draw = [bad.new_zeros(()) for bad in self._bad[:1]]
        self._drawn = [bad.new_full((), _NEVER) for bad in self._bad]

    def mark(self) -> None:
        """Note that what is swept from now on is of another draw; enqueues only."""
        for draw in self._draw:
            draw += 1

    def sweep(self) -> None:
        """Judge every slot and poison it again; enqueues only, and never waits."""
        all_ = zip(self._subjects, self._bad, self._launches, self._drawn, strict=True)
        for subject, bad, launches, drawn in all_:
            if not subject.ref.numel():
                continue
            out = subject.slot.out
            wrong = ~(tile_error(out, subject.ref) <= subject.limit)
            bad += wrong
            launches += wrong.any()
            drawn.copy_(torch.where(wrong.any(), torch.minimum(drawn, self._draw[0]), drawn))
            out.view(torch.int16).fill_(POISON)

    def reports(self) -> list[SlotReport]:
        """One report a slot; every element of a bad tile counts as wrong. Waits for the device."""
        return [
            _tile_report(s, bad.tolist(), int(launches), int(drawn))
            for s, bad, launches, drawn in zip(
                self._subjects, self._bad, self._launches, self._drawn, strict=True
            )
        ]


def _tile_report(subject: ByTiles, bad: list[list[int]], launches: int, draw: int) -> SlotReport:
    m, n = subject.ref.shape
    tiles = []
    for row, marks in enumerate(bad):
        for column, times in enumerate(marks):
            size = (min(m, (row + 1) * TILE) - row * TILE) * (
                min(n, (column + 1) * TILE) - column * TILE
            )
            if times:
                tiles.append((row, column, times * size))
    wrong = sum(count for _, _, count in tiles)
    draw = 0 if draw == _NEVER else draw
    return SlotReport(wrong, 0, 0, launches, 0, None, tuple(tiles), draw=draw, shape=(m, n))


class Judge:
    """Everything a chain keeps: slots by their elements, others by their tiles."""

    def __init__(self, slots: Sequence[Slot | ByTiles]) -> None:
        self._slots = tuple(slots)
        elements = [s for s in slots if isinstance(s, Slot)]
        self._checker = Checker(elements)
        self._tiles = TileJudge([s for s in slots if isinstance(s, ByTiles)])

    @property
    def sweeps(self) -> int:
        return self._checker.sweeps

    def mark(self) -> None:
        """Note that what is swept from now on is of another draw."""
        self._checker.mark()
        self._tiles.mark()

    def sweep(self) -> None:
        self._checker.sweep()
        self._tiles.sweep()

    def reports(self) -> list[SlotReport]:
        """One report for each of what it was given, in order; waits for the device."""
        elements, tiles = iter(self._checker.reports()), iter(self._tiles.reports())
        return [next(elements if isinstance(s, Slot) else tiles) for s in self._slots]
