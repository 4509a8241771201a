"""How a probe goes on where earlier ones ended: known entrants, and where each is known from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...cache.ledger import Ledger
from ...cache.rows import Evidence
from ..evidence.recorder import Recorder
from ..history import Entry, Recalled, times_run, winner_of
from ..layer import Entrant, ProbedLayer
from ..steps import Started
from ..verdict.buckets import MRange


def resume(entrant: Entrant, known: Entry, rows: Sequence[Evidence]) -> None:
    """Bring an entrant to where its measurement had brought it."""
    entrant.known = True
    entrant.winner = {m: t for m, t in winner_of(known).items() if m in entrant.tactics}
    entrant.dead.update(known["dead"])
    _widths(entrant, rows)


def go_on(entrant: Entrant, known: Started, rows: Sequence[Evidence]) -> None:
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


def into(record: Recorder, recalled: Recalled, entrants: Sequence[Entrant]) -> None:
    """Make what is known of these entrants part of this run's record."""
    names = {e.name for e in entrants if e.known or e.name in recalled.started}
    rows = [row for name in recalled.evidence.keys() & names for row in recalled.evidence[name]]
    record.recall(
        sorted(rows, key=lambda row: row.id or 0),
        [row for row in recalled.findings if row.backend in names],
        [row for row in recalled.timings if row.backend in names],
    )


def origin(
    layer: ProbedLayer, entrants: Sequence[Entrant], recalled: Recalled, ledger: Ledger
) -> dict[str, Any]:
    """What of a layer came from where, as a probe reports it.

    ``known`` are backends with the ``run`` that measured them and when that began, ``measured`` the
    others, ``resumed`` those of them of which runs that were killed had finished how many steps;
    ``times`` is the run whose times are used, None for this one.
    """
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


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much of a probe was known, in a line; empty where nothing was."""
    said = [text for text in (_layers_known(rows), _steps_taken_up(rows)) if text]
    return "; ".join(said)


def _layers_known(rows: Sequence[Mapping[str, Any]]) -> str:
    if not any(row["known"] for row in rows):
        return ""
    whole = [row for row in rows if not row["measured"] and row["times"] is not None]
    sources = {known["run"]: known["at"] for row in rows for known in row["known"]}
    days = {run: time.strftime("%Y-%m-%d", time.gmtime(at or 0)) for run, at in sources.items()}
    named = [f"{run} ({day})" for run, day in days.items()]
    origin = f"run {named[0]}" if len(named) == 1 else f"runs {', '.join(named[:3])}"
    if len(named) > 3:
        origin += f" and {len(named) - 3} more"
    text = f"{len(whole)} of {len(rows)} layers known from {origin}, "
    text += f"measured {len(rows) - len(whole)}"
    partly = sum(len(row["known"]) for row in rows if row not in whole)
    if partly:
        text += f" (where {partly} backends were known and timed only)"
    return text


def _steps_taken_up(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = [part for row in rows for part in row["resumed"]]
    if not parts:
        return ""
    runs = list(dict.fromkeys(run for part in parts for run in part["runs"]))
    origin = f"run {runs[0]}" if len(runs) == 1 else f"{len(runs)} runs"
    count = sum(part["steps"] for part in parts)
    return f"went on after {count} steps that {origin} had finished of {_many(rows)}"


def _many(rows: Sequence[Mapping[str, Any]]) -> str:
    count = sum(bool(row["resumed"]) for row in rows)
    return "a layer" if count == 1 else f"{count} layers"
