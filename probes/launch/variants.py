"""Many weights with known answers out of few: rows rolled, and signs flipped.

The rows of a weight are the columns of the output, so a weight whose rows are moved has the answer
with its columns moved, and one with the other signs the answer with the other sign. Nothing is
drawn, and no answer is computed anew. For checks of *which* weight a backend used: as data they are
the problem they were made of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..check.sweep import Slot, slot
from ..data.generator import mix
from ..problem import Fp4Tensor
from .case import Case

SIGNS = 0x88
"""The sign bits of both e2m1 codes of a byte."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A case's weight with its rows moved down by `shift`, and negated or not."""

    case: Case
    shift: int
    negated: bool

    @property
    def weight(self) -> Fp4Tensor:
        """The weight (n, k), in memory of its own."""
        drawn = self.case.operands.weight
        codes, scales = (t.roll(self.shift, 0) for t in (drawn.codes, drawn.scales))
        codes = codes ^ SIGNS if self.negated else codes
        return replace(drawn, codes=codes, scales=scales, global_scale=drawn.global_scale.clone())

    def slot(self, offset: int, m: int, guard: int | None = None) -> Slot:
        """A poisoned place for the output of `m` rows from `offset`; see `check.sweep.slot`."""
        right = self.case.expectation.window(offset, offset + m)
        lo, hi = (t.roll(self.shift, 1) for t in (right.lo, right.hi))
        if self.negated:
            lo, hi = -hi, -lo
        return slot(lo, hi, guard)


def variant(case: Case, index: int) -> Variant:
    """Variant `index` of a case, one of 2 * n by a hash: whatever the number of a table's slots,
    two that share one differ."""
    bits = mix(index + 1)
    return Variant(case, bits % case.problem.n, bool(bits >> 20 & 1))


def same_place(old: Fp4Tensor, new: Fp4Tensor) -> None:
    """Put the bytes of `new` where those of `old` are."""
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...] = (
        (old.codes, new.codes),
        (old.scales, new.scales),
        (old.global_scale, new.global_scale),
    )
    for to, origin in pairs:
        to.copy_(origin)
