"""What the probes of several GPUs decide together, so that what one proves holds for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from threading import Condition, Lock
from typing import Any

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
    partners: Mapping[str, Partner] = field(default_factory=dict)
    """By device label: the probe that another GPU of the same model runs meanwhile."""

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


_LOOK = 0.25
"""Seconds between two looks at whether the one that is waited for has ended."""


class _Table:
    """What two sides have said to each other, in order. `folder` is of both while one is here."""

    def __init__(self) -> None:
        self.turn = Condition()
        self.said: tuple[list[Any], list[Any]] = ([], [])
        self.gone = [False, False]
        self.folder = TemporaryDirectory(prefix="fp4tune-ranks-")


class Partner:
    """One side of two probes that do something together: `rank` is 0 or 1."""

    def __init__(self, table: _Table, rank: int) -> None:
        self._table = table
        self.rank = rank

    def place(self) -> str:
        """A path that is the same on both sides after as many swaps, and was never before."""
        return f"{self._table.folder.name}/{len(self._table.said[self.rank])}"

    def swap(self, value: Any, beat: Callable[[], None]) -> Any:
        """What the other side gives for `value`, once it does; None where it has ended. `beat` is
        called while it is waited for, and may raise."""
        table, other = self._table, 1 - self.rank
        with table.turn:
            table.said[self.rank].append(value)
            number = len(table.said[self.rank])
            table.turn.notify_all()
            while len(table.said[other]) < number:
                if table.gone[other]:
                    return None
                table.turn.wait(_LOOK)
                beat()
            return table.said[other][number - 1]

    def leave(self) -> None:
        """This side says nothing any more."""
        with self._table.turn:
            self._table.gone[self.rank] = True
            self._table.turn.notify_all()
            if all(self._table.gone):
                self._table.folder.cleanup()


def paired(labels: Mapping[str, str]) -> dict[str, Partner]:
    """Partners of devices two by two, by label; `labels` have the model of each. One that is left
    over has none."""
    waiting: dict[str, str] = {}
    found: dict[str, Partner] = {}
    for label, model in labels.items():
        first = waiting.pop(model, None)
        if first is None:
            waiting[model] = label
            continue
        table = _Table()
        found[first], found[label] = Partner(table, 0), Partner(table, 1)
    return found
