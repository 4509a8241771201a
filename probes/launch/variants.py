"""Many weights with known answers out of few: rows rolled, and signs flipped.

The rows of a weight (of routed experts, those of w2) are the columns of the output, so a weight
whose rows are moved has the answer with its columns moved, and one with the other signs the answer
with the other sign. Nothing is drawn, and no answer is computed anew. For checks of *which* weight
a backend used: as data they are the problem they were made of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..check.sweep import Slot, slot
from ..data.generator import mix
from ..grouped.tensors import SIGNS, ExpertWeights
from .case import Case, copy_over


@dataclass(frozen=True, slots=True)
class Variant:
    """A case's weight with its rows moved down by `shift`, and negated or not."""

    case: Case
    shift: int
    negated: bool

    @property
    def weight(self) -> Any:
        """The weight (n, k), or the experts, in memory of its own."""
        drawn: Any = self.case.operands.weight
        if isinstance(drawn, ExpertWeights):
            return drawn.moved(self.shift, self.negated)
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


def same_place(old: Any, new: Any) -> None:
    """Put the bytes of `new` where those of `old` are."""
    copy_over(new, old)
