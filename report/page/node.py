"""The page of one node, from its state directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...autotune.publication import published
from ...autotune.publication.published import Standing
from ...cache import quarantine
from ...cache.rows import Finding, Run
from .. import documents
from ..numbers import count, when
from ..wording import scope_text
from . import bounds, changes, environments, findings, heatmap, render, times
from .render import PageSection

_RUNS = 8
"""Of the last runs that are listed."""


@dataclass(frozen=True, slots=True)
class NodeRows:
    """What a node's page is made of: what is published, the generation before it and why others
    cannot be read, and what the ledger has, where there is one."""

    now: Standing
    old: Standing | None = None
    unread: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    runs: Sequence[Run] = ()
    quarantines: Sequence[quarantine.Quarantine] = ()
    ledger: bool = True


def document(place: Path) -> str:
    """What `place` publishes, and the evidence behind it where it has a ledger, as one page.

    Raises Missing where nothing is published, and Foreign, NewerSchema or Corrupt.
    """
    now = published.load(place)
    found, runs = documents.stored_findings(place)
    old, unread = changes.previous(place, now.generation)
    entries, _ = quarantine.read(quarantine.store(place))
    return draw(NodeRows(now, old, unread, found, runs, entries, bool(runs)))


def draw(rows: NodeRows) -> str:
    """The page of what was read already."""
    now = rows.now
    scopes = published.by_scope(now.candidates)
    for c in now.choices:
        scopes.setdefault(c.scope, [])
    maps, timed, verdicts, sure = [], [], [], []
    for scope, candidates in scopes.items():
        mine = [c for c in now.choices if c.scope == scope]
        known = heatmap.names(mine, candidates)
        maps.append(heatmap.scope_maps(scope, mine, candidates, known))
        timed.append(times.scope_times(scope, mine, candidates, known))
        verdicts.append(times.scope_verdicts(scope, candidates, known))
        sure.append(bounds.scope_bounds(scope_text(*scope), mine, known))
    seen = findings.section(findings.kinds(rows.findings), {c.backend for c in now.candidates})
    if not rows.ledger:
        note = "There is no ledger here, so nothing is known of findings and runs."
        seen = findings.Findings(note=note)
    unsupported = now.meta.get("unsupported")
    left_out = unsupported if isinstance(unsupported, dict) else {}
    held = environments.environments(now.environments)
    return render.page(
        f"FP4 GEMM choices on {_device_names(now)}",
        f"Generation {now.generation}, published {when(now.meta.get('published'))}",
        _node_glance(rows),
        [
            PageSection("quarantine", "Quarantine", rows.quarantines),
            PageSection("choices", "Choices", maps),
            PageSection("changes", "What changed", changes.section(rows.old, now, rows.unread)),
            PageSection("times", "Times", timed),
            PageSection("verdicts", "Verdicts", (verdicts, left_out) if verdicts else None),
            PageSection("bounds", "How sure", [each for each in sure if each]),
            PageSection("findings", "Findings", seen),
            PageSection("environment", "Environment", _environment(held, rows.runs)),
        ],
    )


def _environment(
    held: environments.Environments | None, runs: Sequence[Run]
) -> tuple[environments.Environments | None, Sequence[Run]] | None:
    return (held, list(runs)[-_RUNS:][::-1]) if held or runs else None


def _device_names(now: Standing) -> str:
    names = list(dict.fromkeys([*(c.gpu for c in now.choices), *(c.gpu for c in now.candidates)]))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "?"


def _node_glance(rows: NodeRows) -> list[tuple[str, object]]:
    choices, candidates = rows.now.choices, rows.now.candidates
    layers = {(c.arch, c.gpu, c.profile, c.bucket.n, c.bucket.k) for c in choices}
    statuses = Counter(c.status for c in choices)
    said = [("safe", "proven"), ("floor", "the floor"), ("none", "none safe")]
    unsafe = {c.backend for c in candidates if c.verdict == "unsafe"}
    facts: list[tuple[str, object]] = [
        ("Layers", f"{len(layers):,}"),
        ("Buckets", f"{len(choices):,}"),
        ("Choices", ", ".join(f"{statuses[s]} {word}" for s, word in said if statuses[s])),
        ("Backends compared", len({c.backend for c in candidates})),
        ("Unsafe somewhere", ", ".join(sorted(unsafe)) or "none"),
    ]
    if rows.ledger:
        kinds = count(len(findings.groups(rows.findings)), "kind")
        number = len(rows.findings)
        facts.append(("Findings", f"{number:,} of {kinds}" if number else "none"))
    return facts
