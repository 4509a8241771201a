"""The page of one node, from its state directory."""

from __future__ import annotations

import platform
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...autotune.publication import published
from ...autotune.publication.published import Publication
from ...cache import facts, quarantine, quarantine_store
from ...cache.rows import Finding, Run, Timing
from ...engines import names
from ...words import STATUS_WORDS, UNREADABLE
from .. import brief, documents
from ..numbers import count, when
from ..wording import scope_text
from . import bounds, changes, environments, experts, findings, heatmap, render, times
from .render import PageSection

_MOST_BROKE = 5
_RUNS = 8
"""Of the last runs that are listed."""


@dataclass(frozen=True, slots=True)
class NodeRows:
    """What a node's page is made of: what is published, the generation before it and why others
    cannot be read, and what the ledger has, where there is one."""

    now: Publication
    old: Publication | None = None
    unread: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    runs: Sequence[Run] = ()
    quarantines: Sequence[quarantine.Quarantine] = ()
    ledger: bool = True
    problem: str | None = None
    """Why the ledger cannot be read, where it is there."""
    status: Mapping[str, Any] | None = None
    """What `facts` says of the state that all this is from."""
    timings: Sequence[Timing] = ()
    """Of routed experts, by routing law."""


def document(place: Path) -> str:
    """What `place` publishes, and the evidence behind it where it has a ledger, as one page.

    Raises Missing where nothing is published, and Foreign, NewerSchema or Corrupt.
    """
    now = published.load(place)
    found, runs = documents.stored_findings(place)
    old, unread = changes.previous(place, now.generation)
    entries, _ = quarantine_store.read(quarantine_store.place(place))
    problem = documents.ledger_problem(place)
    told = facts.gather(place)
    timings = documents.stored_timings(place)
    ledger = bool(runs)
    return draw(NodeRows(now, old, unread, found, runs, entries, ledger, problem, told, timings))


def draw(rows: NodeRows) -> str:
    """The page of what was read already."""
    now = rows.now
    scopes = published.by_scope(now.candidates)
    for c in now.choices:
        scopes.setdefault(c.scope, [])
    maps, timed, verdicts, sure = [], [], [], []
    routed: list[experts.ModelView] = []
    for scope, candidates in scopes.items():
        mine = [c for c in now.choices if c.scope == scope]
        known = heatmap.names(mine, candidates)
        maps.append(heatmap.scope_maps(scope, mine, candidates, known))
        routed += experts.section(mine, candidates, rows.timings, now.meta, known)
        timed.append(times.scope_times(scope, mine, candidates, known))
        verdicts.append(times.scope_verdicts(scope, candidates, known))
        sure.append(bounds.scope_bounds(scope_text(*scope), mine, known))
    seen = findings.section(findings.kinds(rows.findings), {c.backend for c in now.candidates})
    if not rows.ledger:
        note = "There is no ledger here, so nothing is known of findings and runs."
        if rows.problem is not None:
            note = f"The ledger is damaged, so findings and runs are not known: {rows.problem}."
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
            PageSection("experts", "Routed experts", routed),
            PageSection("changes", "What changed", changes.section(rows.old, now, rows.unread)),
            PageSection("times", "Times", timed),
            PageSection("verdicts", "Verdicts", (verdicts, left_out) if verdicts else None),
            PageSection("bounds", "How sure", [each for each in sure if each]),
            PageSection("findings", "Findings", seen),
            PageSection("environment", "Environment", _environment(held, rows.runs)),
        ],
        _page_status(rows),
    )


def _page_status(rows: NodeRows) -> render.PageStatus | None:
    said = rows.status
    if said is None:
        return None
    word, notes = STATUS_WORDS[said["status"]], []
    if said["elsewhere"]:
        word, notes = f"{word} on this host", [_capital(said["elsewhere"])]
    if rows.problem is not None:
        notes.append(f"{STATUS_WORDS[UNREADABLE]} ledger: {rows.problem}")
    return render.PageStatus(
        word,
        said["since"],
        said["reason"],
        tuple(notes),
        said["do"] or _then(said),
        _broke(rows),
        f"Made on {platform.node() or 'a host without a name'}, {when(time.time())}, from "
        f"{said['state']}. It says what was so there and then.",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _then(said: Mapping[str, Any]) -> str:
    """What to run where nothing is to be mended: what makes an engine run the choice, where it was
    made for one."""
    engines = [scope["profile"] for scope in said["scopes"] if scope["profile"] in names.ENGINES]
    what = f"emit {engines[0]}" if engines else "show"
    return f"fp4tune {what} --state {shlex.quote(str(said['state']))}"


def _broke(rows: NodeRows) -> tuple[str, ...]:
    """What is unsafe and where that shows, worst first; by the verdicts' reasons where the ledger
    does not say more."""
    unsafe = [c for c in rows.now.candidates if c.verdict == "unsafe"]
    by_backend: dict[str, list[Finding]] = {c.backend: [] for c in unsafe}
    for finding in rows.findings:
        if finding.backend in by_backend:
            by_backend[finding.backend].append(finding)
    reasons = {
        name: Counter(str(r) for c in unsafe if c.backend == name for r in c.reasons)
        for name in by_backend
    }
    said = [
        brief.harm(name, mine, [reason for reason, _ in reasons[name].most_common(3)])
        for name, mine in brief.worst_first(by_backend)
    ]
    more = len(said) - _MOST_BROKE
    return (*said[:_MOST_BROKE], *([f"and {more} more, below"] if more > 0 else ()))


def _environment(
    held: environments.Environments | None, runs: Sequence[Run]
) -> tuple[environments.Environments | None, Sequence[Run]] | None:
    return (held, list(runs)[-_RUNS:][::-1]) if held or runs else None


def _device_names(now: Publication) -> str:
    names = list(dict.fromkeys([*(c.gpu for c in now.choices), *(c.gpu for c in now.candidates)]))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "?"


def _node_glance(rows: NodeRows) -> list[tuple[str, object]]:
    choices, candidates = rows.now.choices, rows.now.candidates
    layers = {(c.arch, c.gpu, c.profile, c.bucket.groups, c.bucket.n, c.bucket.k) for c in choices}
    statuses = Counter(c.status for c in choices)
    holds = rows.status is None or rows.status["status"] == "safe"
    proven = "proven" if holds else "proven when published"
    said = [("safe", proven), ("floor", "the floor"), ("none", "none safe")]
    unsafe = {c.backend for c in candidates if c.verdict == "unsafe"}
    glance: list[tuple[str, object]] = [
        ("Layers", f"{len(layers):,}"),
        ("Buckets", f"{len(choices):,}"),
        ("Choices", ", ".join(f"{statuses[s]} {word}" for s, word in said if statuses[s])),
        ("Backends compared", len({c.backend for c in candidates})),
        ("Unsafe somewhere", ", ".join(sorted(unsafe)) or "none"),
    ]
    if rows.ledger:
        kinds = count(len(findings.groups(rows.findings)), "kind")
        number = len(rows.findings)
        glance.append(("Findings", f"{number:,} of {kinds}" if number else "none"))
    return glance
