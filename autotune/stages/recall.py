"""How a probe goes on where earlier ones ended: known entrants, and where each is known from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...cache.ledger import Ledger
from ...cache.rows import Evidence
from ..evidence.recorder import Recorder
from ..history import Entry, Recalled, times_run, winner_of
from ..layer import Entrant, ProbedLayer
from ..steps import Started
from ..verdict.buckets import MRange


def take_up(
    layer: ProbedLayer,
    entrants: Sequence[Entrant],
    recalled: Recalled,
    record: Recorder,
    ledger: Ledger,
) -> dict[str, Any]:
    """Bring the entrants of a layer to where earlier runs had brought them, and make what these
    recorded part of this run's record; what of the layer is known from where, as a probe reports
    it.

    ``known`` are backends with the ``run`` that measured them and when that began, ``measured`` the
    others, ``resumed`` those of them of which runs that were killed had finished how many steps;
    ``times`` is the run whose times are used, None for this one.
    """
    for entrant in entrants:
        if (known := recalled.entries.get(entrant.name)) is not None:
            _resume(entrant, known, recalled.evidence[entrant.name])
        elif (part := recalled.started.get(entrant.name)) is not None:
            _go_on(entrant, part, recalled.evidence[entrant.name])
    _record(recalled, entrants, record)
    p = layer.problem
    started = {run.id: run.started for run in ledger.runs()} if recalled.entries else {}
    first = {e.name: recalled.entries[e.name]["runs"][0] for e in entrants if e.known}
    return {
        **{name: getattr(p, name) for name in ("format", "activation", "out_dtype", "groups")},
        "n": p.n,
        "k": p.k,
        "known": [
            {"backend": name, "run": run, "at": started.get(run)} for name, run in first.items()
        ],
        "measured": [e.name for e in entrants if not e.known],
        "resumed": [
            {"backend": name, "runs": list(part.runs), "steps": part.steps}
            for name, part in recalled.started.items()
        ],
        "times": times_run(recalled.times) if recalled.times else recalled.timed,
    }


def _resume(entrant: Entrant, known: Entry, rows: Sequence[Evidence]) -> None:
    """Bring an entrant to where its measurement had brought it."""
    entrant.known = True
    entrant.winner = {m: t for m, t in winner_of(known).items() if m in entrant.tactics}
    entrant.dead.update(known["dead"])
    _widths(entrant, rows)


def _go_on(entrant: Entrant, known: Started, rows: Sequence[Evidence]) -> None:
    """Bring an entrant to where the runs that were killed had brought it."""
    entrant.done |= known.done
    entrant.opens = known.opened
    entrant.dead.update(known.dead)
    entrant.faulty |= known.faulty
    entrant.exempt.update(known.exempt)
    entrant.reached.update(known.reached)
    if known.winner is not None:
        entrant.compared = True
        entrant.winner = {m: t for m, t in known.winner.items() if m in entrant.tactics}
    _widths(entrant, rows)


def _widths(entrant: Entrant, rows: Sequence[Evidence]) -> None:
    for row in rows:
        if row.width is not None:
            m = MRange(row.bucket.m_lo, row.bucket.m_hi)
            entrant.width[m, row.tactic] = max(row.width, entrant.width.get((m, row.tactic), 0))


def _record(recalled: Recalled, entrants: Sequence[Entrant], record: Recorder) -> None:
    names = {e.name for e in entrants if e.known or e.name in recalled.started}
    rows = [row for name in recalled.evidence.keys() & names for row in recalled.evidence[name]]
    record.recall(
        sorted(rows, key=lambda row: row.id or 0),
        [row for row in recalled.findings if row.backend in names],
        [row for row in recalled.timings if row.backend in names],
    )
