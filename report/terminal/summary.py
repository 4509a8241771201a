"""A finished probe, and what a state directory holds, as one screen of tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ...autotune.evidence import audits
from ...autotune.evidence.wording import known_sentence
from ...autotune.publication import published
from ...cache import state
from ...cache.experts import layer_words
from ...cache.rows import Timing
from ...engines import names
from ..brief import engines_for
from ..documents import damage, forgotten, ledger_problem, stored_findings, stored_timings
from ..wording import range_text, scope_text, size_text, weights_text
from .console import console, styled, table
from .experts import law_lines, single_lines
from .findings import print_finding, print_findings
from .tables import print_backends, print_bounds, print_choices, print_reasons

if TYPE_CHECKING:
    from ...autotune.plan import Report

_MOST_NOTES = 6


def print_probe(report: Report) -> None:
    """All of a finished probe: choices by layer, backends, findings, what could not run."""
    out = console()
    out.print()
    out.print(styled((report.target.name, "bold"), f" ({report.target.device.arch})"))
    if report.candidates:
        print_choices(out, report.choices, report.candidates)
        print_backends(out, report.candidates, report.build_seconds)
        print_bounds(out, report.choices)
        print_findings(out, report.findings)
        lines = [*single_lines(report.candidates), *law_lines(report.timings)]
        for line in lines:
            out.print(line)
    print_reasons(out, "Audit", audits.remarks(report.audits))
    _print_unsteady(out, report.timings)
    _print_left(out, report.left)
    print_reasons(out, "Did not load or build", report.broken)
    print_reasons(out, "Cannot run here", report.unsupported)
    if said := [*report.set_aside, *filter(None, [known_sentence(report.known)])]:
        out.print()
    for sentence in said:
        out.print(sentence)
    if report.generation is not None:
        out.print()
        out.print(
            f"probed in {report.seconds:.0f} s, after {report.build_wall_seconds:.0f} s of "
            f"loading and building; stored as generation {report.generation}; run {report.run}"
        )


def _print_unsteady(out: Console, timings: Sequence[Timing]) -> None:
    """Times that say of themselves that they are not to be trusted: each note once, with whose."""
    notes: dict[tuple[str, str], dict[str, None]] = {}
    for row in timings:
        if note := row.detail.get("note"):
            notes.setdefault((size_text(row.bucket), str(note)), {})[row.backend] = None
    for (size, note), backends in list(notes.items())[:_MOST_NOTES]:
        out.print(f"Unsteady times, {size} ({', '.join(backends)}): {note}")
    if len(notes) > _MOST_NOTES:
        out.print(f"and {len(notes) - _MOST_NOTES} more; --json has them under timings")


def _print_left(out: Console, left: Sequence[Mapping[str, Any]]) -> None:
    """What the time budget did not reach."""
    for row in left:
        ranges = ", ".join(range_text(lo, hi) for lo, hi in row["m"])
        weights = weights_text(row["activation"])
        out.print(
            f"The time budget ended before anything was proven in {row['format']} {weights} "
            f"{layer_words(row)} at m={ranges}; what stood there stands, and the next probe "
            "goes on there"
        )


def print_stored(place: Path, stored: published.Publication, every_finding: bool) -> None:
    """Choices, verdicts, findings and environments of a state directory: `stored`, and what its
    ledger has."""
    out = console()
    found, runs = stored_findings(place)
    for scope, candidates in published.by_scope(stored.candidates).items():
        out.print()
        out.print(styled((scope_text(*scope), "bold")))
        mine = [c for c in stored.choices if c.scope == scope]
        print_choices(out, mine, candidates)
        print_backends(out, candidates)
        print_bounds(out, mine)
        for line in single_lines(candidates, stored.meta):
            out.print(line)
        for format_ in dict.fromkeys(c.bucket.format for c in mine):
            chosen = [c.backend for c in mine if c.bucket.format == format_ and c.status != "none"]
            for line in engines_for(chosen, format_, names.sm_of(scope[0]), scope[2]):
                out.print(line)
    problem = ledger_problem(place)
    if os.path.exists(place / state.LEDGER) and not os.access(place / state.LEDGER, os.R_OK):
        out.print("Findings and runs are in the ledger, which its owner and root may read.")
    elif problem is not None:
        out.print(f"Findings and runs are not known: the ledger is there and unreadable, {problem}")
    elif every_finding:
        for finding in found:
            print_finding(out, finding)
    else:
        print_findings(out, found, os.path.exists(place / state.LEDGER))
    for line in law_lines(stored_timings(place)):
        out.print(line)
    print_reasons(out, "Cannot run here", stored.meta.get("unsupported", {}))
    made = table("Environments", ("backend", "fingerprint", "versions", "code digest"))
    for environment in stored.environments:
        facts = environment.facts
        versions = ", ".join(f"{k} {v}" for k, v in (facts.get("distributions") or {}).items())
        code = facts.get("code") or facts.get("code_how") or ""
        made.add_row(environment.backend, environment.fingerprint[:12], versions, str(code)[:40])
    out.print(made)
    for run in runs[-5:]:
        out.print(f"run {run.id}: {run.status}, level {run.level}, seed {run.seed}")
    for row in forgotten(place):
        out.print(f"taken back: {row.what}, {row.reason}")
    for sentence in damage(place):
        out.print(sentence)
