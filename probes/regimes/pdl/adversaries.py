"""The three adversaries, put in front of the steps of a chain.

* ``raw``: store the activation, which holds poison until then (read-after-write);
* ``war``: read the output, in which nothing may have been written yet (write-after-read);
* ``waw``: store into the output, which a right kernel then overwrites (write-after-write).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...check.sweep import POISON, TILE
from ...launch.outcome import poison
from .chain import BLOCK, DelayClock, Moves, Step

OVERWRITTEN = -75
"""The bits 0xFFB5, what ``waw`` stores: a NaN, and not the one that means unwritten."""


def _four(bits: int) -> int:
    """Four elements of these 16 bits (as a signed integer) side by side, the same way."""
    return int.from_bytes((bits & 0xFFFF).to_bytes(2, "little") * 4, "little", signed=True)


class Adversary:
    """Adversaries of one kind in front of `steps`, the first of which is step `first` by the clock.

    Steps come by their place in `steps`, outputs by their place among all slots of all steps.
    """

    def __init__(
        self,
        kind: str,
        steps: Sequence[Step],
        clock: DelayClock,
        device: torch.device,
        first: int = 0,
    ) -> None:
        self._kind = kind
        self._steps = tuple(steps)
        self._clock = clock
        self._first = first
        self._moves = Moves([step.moves for step in steps], device)
        self._slots = [slot for step in steps for slot in step.slots]
        self._spans: list[tuple[int, int]] = []
        places: list[tuple[int, int, int, int]] = []
        tiles = 0
        for step in steps:
            begin = len(places)
            for slot in step.slots:
                m, n = slot.out.shape
                places.append((slot.out.data_ptr(), m, n, tiles))
                tiles += -(-m // TILE) * -(-n // TILE)
            self._spans.append((begin, len(places)))
        self._first_tile = [place[3] for place in places]
        self._places = torch.tensor(places or [(0, 0, 0, 0)], dtype=torch.int64, device=device)
        self._early = torch.zeros((max(len(places), 1), 3), dtype=torch.int64, device=device)
        self._bitmap = torch.zeros(max(tiles, 1), dtype=torch.int32, device=device)

    def reset(self) -> None:
        """Make every activation that an adversary will store unusable until it does."""
        for step in self._steps:
            for _, target in step.moves:
                poison(target)

    def clear(self) -> None:
        """Poison every output, as a sweep leaves it."""
        for slot in self._slots:
            poison(slot.out)

    def strike(self, index: int) -> None:
        """Launch the adversary of a step."""
        from . import _adversary_triton as kernels

        clock = self._clock.at(self._first + index)
        grid = (self._clock.programs,)
        if self._kind == "raw":
            kernels.write_late[grid](*clock, *self._moves.of(index), BLOCK=BLOCK, num_warps=8)
        elif self._kind == "war":
            kernels.read_late[grid](
                *clock,
                self._places,
                *self._spans[index],
                self._early,
                self._bitmap,
                _four(POISON),
                TILE=TILE,
                BLOCK=BLOCK,
                num_warps=8,
            )
        else:
            kernels.overwrite_late[grid](
                *clock,
                self._places,
                *self._spans[index],
                _four(OVERWRITTEN),
                BLOCK=BLOCK,
                num_warps=8,
            )

    def early(self, place: int) -> tuple[int, int, tuple[tuple[int, int, int], ...]]:
        """Elements written while the adversary still read, rounds with any, and their tiles."""
        elements, rounds, _ = self._early[place].tolist()
        if not elements:
            return 0, 0, ()
        m, n = self._slots[place].out.shape
        columns = -(-n // TILE)
        first = self._first_tile[place]
        marks = self._bitmap[first : first + -(-m // TILE) * columns].tolist()
        tiles = tuple((*divmod(i, columns), count) for i, count in enumerate(marks) if count)
        return elements, rounds, tiles
