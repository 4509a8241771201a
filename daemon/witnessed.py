"""What the processes that watch on this node have told, summed: for metrics, HTTP and bundles.

It comes through a drop box that anybody here may write to. So it is shown, by who reported it, and
changes nothing: no bound, no verdict, no quarantine.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..witness import counts
from ..witness.counts import COUNTED, WatchReport

EVERY = 2.0
"""Seconds between two looks at the drop box."""
OTHER = "other"
"""The name in metrics of a backend that is not published here: names are others' to make up."""
_MOST_OF_ONE = 4096
"""What of one user is remembered, the longest silent forgotten first: however much one makes up,
nothing of another's is."""
_MOST_NAMES = 4096
_REST = (OTHER, OTHER)
_FORGET = 3600.0
_MOST_EVENTS = 500
Numbers = dict[tuple[str, str], dict[str, int]]
"""(GPU's name, backend) -> counts."""


@dataclass(slots=True)
class WitnessBoard:
    """Counts that only grow, however files come and go."""

    totals: Numbers = field(default_factory=dict)
    reports: Sequence[WatchReport] = ()
    ignored: Sequence[str] = ()
    _last: dict[int, OrderedDict[tuple[str, str, str], dict[str, int]]] = field(
        default_factory=dict
    )
    """By user: what each of its processes had told last, the longest silent first."""
    _box: counts.DropBox | None = None
    _looked: float = -EVERY
    _forgot: float = 0.0

    def look(self, state_dir: str, now: float | None = None) -> None:
        """Read the drop box, at most once in `EVERY` seconds."""
        at = time.monotonic() if now is None else now
        folder = counts.folder_of(state_dir)
        if folder is None or at - self._looked < EVERY:
            return
        self._looked = at
        if at - self._forgot > _FORGET:
            self._forgot = at
            counts.forget_old(folder)
        if self._box is None or self._box.folder != folder:
            self._box = counts.DropBox(folder)
        self.reports, self.ignored = self._box.read()
        for key, found in counts.by_backend(self.reports).items():
            theirs = self._last.setdefault(int(key[2].partition(":")[0]), OrderedDict())
            before = theirs.get(key, {})
            label = key[:2] if key[:2] in self.totals or len(self.totals) < _MOST_NAMES else _REST
            total = self.totals.setdefault(label, dict.fromkeys(COUNTED, 0))
            for name in COUNTED:
                total[name] += max(0, found[name] - before.get(name, 0))
            theirs[key] = {n: max(found[n], before.get(n, 0)) for n in COUNTED}
            theirs.move_to_end(key)
            if len(theirs) > _MOST_OF_ONE:
                theirs.popitem(last=False)

    def metrics(self, backends: Collection[str], gpus: Collection[str]) -> Numbers:
        """`totals` with names that are known here; the others are one."""
        found: Numbers = {}
        for (gpu, backend), numbers in self.totals.items():
            key = (gpu if gpu in gpus else OTHER, backend if backend in backends else OTHER)
            own = found.setdefault(key, dict.fromkeys(COUNTED, 0))
            for name, count in numbers.items():
                own[name] += count
        return found

    def document(self) -> dict[str, Any]:
        """What was counted by whom, and the newest faults and suspicions as events."""
        return {
            "reporters": [
                {
                    "reporter": report.reporter,
                    "uid": report.uid,
                    "pid": report.pid,
                    "at": report.at,
                    "gpu": report.gpu,
                    "arch": report.arch,
                    "uuid": report.uuid,
                    "unwatched": report.unwatched,
                    "left": list(report.left),
                    "watched": [_watched(each) for each in report.watched],
                }
                for report in self.reports
            ],
            "events": self.events(),
            "ignored": list(self.ignored)[:100],
        }

    def events(self) -> list[dict[str, Any]]:
        """Confirmed faults and suspicions, newest first."""
        found = [
            {**fault, "reporter": report.reporter, "gpu": report.gpu}
            for report in self.reports
            for fault in report.faults
        ]
        found.sort(key=lambda fault: -float(fault["at"]))
        return found[:_MOST_EVENTS]


def _watched(each: counts.WatchedLayer) -> Mapping[str, Any]:
    named = {name: getattr(each, name) for name in each.__slots__ if name != "counts"}
    return {**named, **each.counts}
