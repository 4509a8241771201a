"""What the probes of several GPUs decide together, so that what one proves holds for all."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

from .verdict.buckets import MRange


@dataclass(frozen=True, slots=True)
class Agreement:
    """Tactics by GPU model, layer, backend and m range: the first GPU to be done chooses.

    Each GPU grades every tactic itself; one on which the tactic agreed on came out wrong keeps to
    its own, and the node's verdict then says that they differ.
    """

    lock: Lock
    tactics: dict[tuple[Hashable, MRange], str] = field(default_factory=dict)
    orders: dict[tuple[Hashable, MRange], tuple[str, ...]] = field(default_factory=dict)
    """In which order backends are tried within a time budget, of the first GPU to time them."""

    def settle(
        self,
        scope: Hashable,
        own: Mapping[MRange, str],
        possible: Mapping[MRange, Sequence[str]],
    ) -> dict[MRange, str]:
        """The tactic for each m range of `own`: the one agreed on where it is `possible` here."""
        with self.lock:
            agreed = {m: self.tactics.setdefault((scope, m), own[m]) for m in own}
        return {m: agreed[m] if agreed[m] in possible[m] else own[m] for m in own}

    def order(self, scope: Hashable, m: MRange, own: Sequence[str]) -> list[str]:
        """`own`, in the order agreed on, so that all GPUs prove the same; who is unknown to that
        comes last."""
        with self.lock:
            agreed = self.orders.setdefault((scope, m), tuple(own))
        return [n for n in agreed if n in own] + [n for n in own if n not in agreed]
