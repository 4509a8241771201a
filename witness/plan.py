"""Which calls are watched: a few of each graph, others in each, so that each is watched somewhere.

Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
FEW, EVERY = "few", "every"
SHARES = (FEW, EVERY)
LOG, QUARANTINE, STOP = "log", "quarantine", "stop"
ON_FAULT = (LOG, QUARANTINE, STOP)
"""What may be done about a fault: say it; also choose another backend; also end the process."""
ONE_OF = 32
"""Of so many calls one is watched by default."""
PERIOD = 4
"""And of that one, one launch of so many is looked at."""


@dataclass(slots=True)
class WatchPlan(Generic[Key]):
    """Decides, call after call, which are watched; a call is known by its key (layer, kernel).

    share  ``few`` (one of `ONE_OF`) or ``every``
    turn   where this process begins: with several processes of an engine, its rank
    """

    share: str = FEW
    turn: int = 0
    layers: int = 0
    """Weights that may be called, as far as they are known."""
    asked: Counter[Key] = field(default_factory=Counter)
    watched: Counter[Key] = field(default_factory=Counter)
    _by_count: Counter[int] = field(default_factory=Counter)
    _calls: int = 0
    _owed: int = 0
    _graph: int | None = None
    _graphs: int = 0

    def __post_init__(self) -> None:
        if self.share not in SHARES:
            raise ValueError(f"a share of calls is {' or '.join(SHARES)}, not {self.share!r}")
        # A process of few calls watches one, too; of several processes each begins elsewhere.
        self._begin(self.turn * 11, ONE_OF)

    def _begin(self, turn: int, spread: int) -> None:
        """Have one come due within `spread` calls from now on, `turn` says with which."""
        self._calls = ONE_OF - 1 - turn % spread

    def choose(self, key: Key, graph: int | None = None) -> bool:
        """Whether this call is watched; `graph` is a number of the capture that it is part of.

        One comes due with each `ONE_OF` calls, and is given to the first call from then on that is
        watched as seldom as any; at the latest to the last before the next one comes due. Each
        graph begins to count one call further on than the graph before, and no further than there
        are layers: none with a call of each of them, or of `ONE_OF`, is without.
        """
        if key not in self.asked:
            self._by_count[0] += 1
        self.asked[key] += 1
        if self.share == EVERY:
            return self._watch(key)
        if graph is not None and graph != self._graph:
            self._graph = graph
            self._graphs += 1
            self._begin(self._graphs + self.turn, min(ONE_OF, max(1, self.layers)))
        self._calls += 1
        if self._calls >= ONE_OF:
            self._calls = 0
            self._owed += 1
        if not self._owed:
            return False
        if self.watched[key] > self._least() and self._owed < 2:
            return False
        self._owed -= 1
        return self._watch(key)

    def _watch(self, key: Key) -> bool:
        before = self.watched[key]
        self._by_count[before] -= 1
        self._by_count[before + 1] += 1
        if not self._by_count[before]:
            del self._by_count[before]
        self.watched[key] += 1
        return True

    def _least(self) -> int:
        """How often the key that is watched most seldom is."""
        return min(self._by_count)

    def unwatched(self) -> list[Key]:
        """The keys of calls that are watched nowhere in this process, in order of asking."""
        return [key for key in self.asked if not self.watched[key]]
