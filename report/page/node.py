"""The page of one node, from its state directory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ...autotune.publication import published
from ...autotune.publication.published import Standing
from ...cache import quarantine
from ...cache.rows import Candidate, Choice, Finding, Run
from .. import documents
from . import changes, findings, heatmap, sections
from .markup import Child, el, text
from .numbers import count, when
from .page import Section, facts, page


def document(place: Path) -> str:
    """What `place` publishes, and the evidence behind it where it has a ledger, as one page.

    Raises Missing where nothing is published, and Foreign, NewerSchema or Corrupt.
    """
    now = published.load(place)
    found, runs = documents.findings(place)
    old, unread = changes.previous(place, now.generation)
    entries, _ = quarantine.read(quarantine.spools(os.fspath(place)))
    return render(now, old, unread, found, runs, entries, ledger=bool(runs))


def render(
    now: Standing,
    old: Standing | None = None,
    unread: Sequence[str] = (),
    found: Sequence[Finding] = (),
    runs: Sequence[Run] = (),
    entries: Sequence[quarantine.Quarantine] = (),
    ledger: bool = True,
) -> str:
    """The page of what was read already."""
    scopes = published.by_scope(now.candidates)
    for c in now.choices:
        scopes.setdefault(c.scope, [])
    maps, times, verdicts, bounds = [], [], [], []
    for scope, candidates in scopes.items():
        mine = [c for c in now.choices if c.scope == scope]
        known = heatmap.names(mine, candidates)
        title = el("h3", sections.scope_title(*scope))
        maps.append(title + sections.choices(mine, candidates, known))
        times.append(title + sections.times(mine, candidates, known))
        verdicts.append(title + sections.backends(candidates, known))
        sure = heatmap.bounds(mine, known)
        bounds.append(title + sure if sure else Markup(""))
    seen: Child = findings.section(findings.kinds(found), {c.backend for c in now.candidates})
    if not ledger:
        seen = el("p", "There is no ledger here, so nothing is known of findings and runs.")
    headline = f"FP4 GEMM choices on {_devices(now)}"
    unsupported = sections.reasons("Cannot run here", now.meta.get("unsupported"))
    return page(
        headline,
        f"Generation {now.generation}, published {when(now.meta.get('published'))}",
        _glance(now.choices, now.candidates, found, ledger),
        [
            Section("quarantine", "Quarantine", sections.quarantined(entries)),
            Section("choices", "Choices", Markup("").join(maps)),
            Section("changes", "What changed", sections.changed(old, now, unread)),
            Section("times", "Times", Markup("").join(times)),
            Section("verdicts", "Verdicts", Markup("").join(verdicts) + unsupported),
            Section("bounds", "How sure", _sure(Markup("").join(bounds))),
            Section("findings", "Findings", text(seen)),
            Section(
                "environment",
                "Environment",
                sections.environments(now.environments) + sections.runs(runs),
            ),
        ],
    )


def _devices(now: Standing) -> str:
    names = list(dict.fromkeys([*(c.gpu for c in now.choices), *(c.gpu for c in now.candidates)]))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "?"


def _sure(bounds: Markup) -> Markup:
    if not bounds:
        return bounds
    said = (
        "The bound for one regime says nothing of another, and they are never added up. Without a "
        "failure in n different problems it is about 3/n at 95 %."
    )
    return el("p", said, class_="small") + bounds


def _glance(
    choices: Sequence[Choice],
    candidates: Sequence[Candidate],
    found: Sequence[Finding],
    ledger: bool,
) -> Markup:
    layers = {(c.arch, c.gpu, c.profile, c.bucket.n, c.bucket.k) for c in choices}
    statuses = Counter(c.status for c in choices)
    said = [("safe", "proven"), ("floor", "the floor"), ("none", "none safe")]
    rows: list[tuple[Child, Child]] = [
        ("Layers", f"{len(layers):,}"),
        ("Buckets", f"{len(choices):,}"),
        ("Choices", ", ".join(f"{statuses[s]} {word}" for s, word in said if statuses[s])),
        ("Backends compared", len({c.backend for c in candidates})),
    ]
    unsafe = {c.backend for c in candidates if c.verdict == "unsafe"}
    rows.append(("Unsafe somewhere", ", ".join(sorted(unsafe)) or "none"))
    if ledger:
        kinds = len(findings.groups(found))
        rows.append(("Findings", f"{len(found):,} of {count(kinds, 'kind')}" if found else "none"))
    return facts(rows)
