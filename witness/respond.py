"""What happens when a suspicion was judged: a line in the log, a quarantine, an end.

``log`` says it; ``quarantine`` also has the node choose another backend (`fp4tune.report_fault`);
``stop`` also ends this process, with SIGTERM. What could not be confirmed is said, and never more.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from ..cache import reader
from ..errors import printable
from .confirm import CLEARED, FAULT, Confirmation
from .counts import MOST_FAULTS, REGIME
from .plan import LOG, ON_FAULT, QUARANTINE, STOP
from .ring import Record
from .watcher import WatchSubject

_TILE = 128
log = logging.getLogger("fp4tune")


def end_this_process() -> None:
    """SIGTERM to this process: engines end in order on it, and whoever runs them sees that."""
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass(slots=True)
class Responder:
    """Answers what was judged, by `on_fault`; `faults` are documents of what it was, confirmed ones
    before others, and the newest of these."""

    on_fault: str = QUARANTINE
    state_dir: str | None = None
    end: Callable[[], None] = end_this_process
    faults: list[dict[str, Any]] = field(default_factory=list)
    reported: list[reader.Reported] = field(default_factory=list)
    """What became of each fault that was reported, one a backend and tactic."""
    _said: set[tuple[str, str, str]] = field(default_factory=set)
    _condemned: set[tuple[str, str]] = field(default_factory=set)
    _ended: bool = False

    def __post_init__(self) -> None:
        if self.on_fault not in ON_FAULT:
            raise ValueError(f"on a fault: {', '.join(ON_FAULT)}, not {self.on_fault!r}")

    def __call__(self, subject: WatchSubject, record: Record, judged: Confirmation) -> None:
        if judged.status == CLEARED:
            return
        found = document(subject, record, judged)
        self.faults = _kept([*self.faults, found])
        self._say(subject, judged, found)
        if judged.status != FAULT or self.on_fault == LOG:
            return
        key = (subject.backend, subject.tactic)
        if key not in self._condemned:
            self._condemned.add(key)
            self._condemn(subject, record, found)
        if self.on_fault == STOP and not self._ended:
            self.end()
            self._ended = True  # once: a second signal ends many programs out of order

    def _say(self, subject: WatchSubject, judged: Confirmation, found: dict[str, Any]) -> None:
        key = (subject.backend, subject.layer, judged.status)
        if key in self._said:
            return
        self._said.add(key)
        p = subject.problem
        what = "gave a wrong result" if judged.status == FAULT else "is suspected, not confirmed"
        log.warning(
            "%s",
            printable(
                f"fp4tune: {subject.backend} {what} in {subject.layer} (m={found['m']} n={p.n} "
                f"k={p.k}): {judged.why}"
            ),
        )

    def _condemn(self, subject: WatchSubject, record: Record, found: dict[str, Any]) -> None:
        p = subject.problem
        try:
            reported = reader.report_fault(
                subject.backend, record.m, p.n, p.k,
                tactic=None if subject.tactic == "default" else subject.tactic,
                format=p.format, activation=p.activation, out_dtype=p.out_dtype, groups=p.groups,
                reason=f"production: {found['why']} ({subject.layer})",
                state_dir=self.state_dir,
            )  # fmt: skip
        except ValueError as error:  # a name that no quarantine can hold
            log.warning("%s", printable(f"fp4tune: {subject.backend} is not quarantined: {error}"))
            return
        self.reported.append(reported)
        log.warning("%s", printable(f"fp4tune: {reported.quarantine.where()} is quarantined"))


def _kept(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_FAULTS`: of more, the oldest that is not confirmed is left out, and then the
    oldest."""
    while len(found) > MOST_FAULTS:
        odd = next((i for i, each in enumerate(found) if each["status"] != FAULT), 0)
        del found[odd]
    return found


def document(subject: WatchSubject, record: Record, judged: Confirmation) -> dict[str, Any]:
    """What is told of a suspicion: as `counts` reads it back. Numbers that are not finite are None.

    ``tile`` is (row, column) of the first wrong tile of 128 x 128; ``columns`` first and last.
    """
    p = subject.problem
    columns = judged.columns or (0, 0)
    return {
        "status": judged.status,
        "layer": printable(subject.layer, 200),
        "backend": printable(subject.backend, 200),
        "tactic": printable(subject.tactic, 200),
        "format": p.format,
        "activation": p.activation,
        "out_dtype": p.out_dtype,
        "groups": p.groups,
        "n": p.n,
        "k": p.k,
        "m": record.m,
        "row": record.row,
        "tile": [record.row // _TILE, columns[0] // _TILE],
        "columns": list(columns),
        "wrong": judged.wrong,
        "error": judged.error if isfinite(judged.error) else None,
        "allowed": judged.allowed if isfinite(judged.allowed) else None,
        "regime": REGIME,
        "why": printable(judged.why, 200),
        "at": time.time(),
    }
