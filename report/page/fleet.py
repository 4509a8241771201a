"""The page of a fleet, from its store and what `fleet.report` says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...fleet import promote, report
from ...fleet.warehouse import Warehouse
from . import cohorts, fleetrows, heatmap, sections
from . import findings as finding_parts
from .markup import Child, details, el, mark, short, table
from .numbers import count, when
from .page import Section, facts, page

_MOST = 200
_LOGIN = re.compile(r"//[^/@]*@")
"""What a URL may hold that is nobody's business."""


def document(store: str, found: Mapping[str, Any] | None = None) -> str:
    """The page of the fleet store `store`; `found` is its `fleet.report.report`, if made already.

    Raises Refused for what is no fleet store.
    """
    found = found or report.report(store)
    with Warehouse(store) as warehouse:
        choices = fleetrows.choices(warehouse)
        timed = fleetrows.times(warehouse)
        verdicts = fleetrows.verdicts(warehouse)
        kinds = fleetrows.findings(warehouse)
        environments = fleetrows.environments(warehouse)
        happened = promote.events(warehouse.place)
    maps, times = [], []
    for scope, mine in fleetrows.by_scope(choices).items():
        candidates = [c for c in timed if (c.arch, c.gpu) == scope[:2]]
        known = heatmap.names([c.row for c in mine], candidates)
        title = el("h3", sections.scope_title(*scope))
        maps.append(title + cohorts.choices(mine, known))
        spread = "between GPUs: the median, below it the middle half"
        times.append(title + sections.times([c.row for c in mine], candidates, known, spread))
    return page(
        f"FP4 GEMM choices of {count(found['nodes'], 'node')}",
        f"{_LOGIN.sub('//', found['store'])}: {count(found['bundles'], 'bundle')}, "
        f"digest {found['digest'][:12]}",
        _glance(found),
        [
            Section("suspects", "Suspects", _suspects(found)),
            Section("choices", "Choices", Markup("").join(maps)),
            Section("changes", "What changed", _changed(happened)),
            Section("cohorts", "Cohorts", cohorts.evidence(found)),
            Section("times", "Times", Markup("").join(times)),
            Section("verdicts", "Verdicts", _verdicts(verdicts)),
            Section("slow", "Slow GPUs", _slow(found["slow_gpus"])),
            Section("disagreements", "Disagreements", _disagreements(found["disagreements"])),
            Section("findings", "Findings", finding_parts.section(kinds)),
            Section("environment", "Environment", sections.environments(environments)),
        ],
    )


def _glance(found: Mapping[str, Any]) -> Markup:
    named = (
        ("Nodes", "nodes"),
        ("Cohorts", "cohorts"),
        ("Suspect builds", "suspect_builds"),
        ("Suspect GPUs", "suspect_gpus"),
        ("Undetermined", "undetermined"),
        ("Slow GPUs", "slow_gpus"),
    )

    def number(value: Any) -> str:
        return f"{value if isinstance(value, int) else len(value):,}"

    return facts([(title, number(found[name])) for title, name in named])


def _suspects(found: Mapping[str, Any]) -> Markup:
    parts: list[Markup] = []
    rows: list[Sequence[Child]]
    if found["suspect_builds"]:
        rows = [
            (b["backend"], b["gpu"], _code(b["fingerprint"]), _code(b["code"]), _all_seen(b))
            for b in found["suspect_builds"][:_MOST]
        ]
        headings = ("build of", "GPU model", "environment", "code digest", "what fails")
        parts.append(
            table(
                _first("Builds that fail on all GPUs alike", found["suspect_builds"]),
                headings,
                rows,
                class_="words",
            )
        )
    if found["suspect_gpus"]:
        rows = [
            (_code(g["device"], 42), _code(g["node"]), g["gpu"], f"{g['odds']:.2g}", _gpu_seen(g))
            for g in found["suspect_gpus"][:_MOST]
        ]
        headings = ("GPU", "node", "model", "odds", "what fails")
        parts.append(
            table(
                _first("GPUs that fail by themselves", found["suspect_gpus"]),
                headings,
                rows,
                (3,),
                class_="words",
            )
        )
    if found["undetermined"]:
        rows = [
            (
                u["backend"],
                f"{u['regime']}, {u['data']}",
                f"{u['gpus_failing']} of {u['gpus']}",
                u["gpu"],
                _code(u["fingerprint"]),
            )
            for u in found["undetermined"][:_MOST]
        ]
        headings = ("backend", "where", "GPUs failing", "GPU model", "environment")
        parts.append(
            table(
                _first(
                    "Undetermined: neither the GPU nor the build is clear", found["undetermined"]
                ),
                headings,
                rows,
            )
        )
    if not parts:
        parts.append(el("p", mark("safe", "✓", "No GPU and no build is under suspicion.", True)))
    return Markup("").join(parts)


def _all_seen(build: Mapping[str, Any]) -> Child:
    return [
        el(
            "div",
            f"{s['regime']}, {s['data']}: {s['gpus_failing']} of {s['gpus']} GPUs on "
            f"{count(s['nodes_failing'], 'node')}, {s['failures']:,} of {s['trials']:,} problems",
        )
        for s in build["seen"][:12]
    ]


def _gpu_seen(gpu: Mapping[str, Any]) -> Child:
    return [
        el(
            "div",
            f"{s['backend']}, {s['regime']}, {s['data']}: {s['failures']:,} of {s['trials']:,} "
            f"problems; {s['gpus']} GPUs in its cohort",
        )
        for s in gpu["seen"][:12]
    ]


def _first(caption: str, rows: Sequence[object]) -> str:
    """A caption that says so where not all rows are shown."""
    return caption if len(rows) <= _MOST else f"{caption} (the first {_MOST} of {len(rows):,})"


def _code(value: object, longest: int = 13) -> Markup:
    return el("code", short(value or "", longest))


def _changed(happened: Sequence[Mapping[str, Any]]) -> Markup:
    if not happened:
        return el("p", "No generation of choices has been made yet.")
    steps = [e for e in happened if "number" in e]
    rows = [
        (e["number"], e.get("stage"), when(e.get("at")), e.get("reason", "")) for e in steps[-20:]
    ]
    log = table("Steps of generations", ("generation", "stage", "at", "reason"), rows[::-1])
    made = [e for e in steps if "choices" in e]
    if len(made) < 2:
        return el("p", "There is one generation only, so nothing to compare with.") + log
    old, new = made[-2], made[-1]
    before, after = fleetrows.said(old["choices"]), fleetrows.said(new["choices"])
    changed = [
        (place, before.get(place, "nothing"), after.get(place, "nothing"))
        for place in dict.fromkeys([*after, *before])
        if before.get(place) != after.get(place)
    ]
    title = f"Generation {old['number']} to {new['number']}"
    if not changed:
        return el("p", f"{title}: the same choices.") + log
    body = table(
        _first(title, changed), ("where", "before", "now"), changed[:_MOST], class_="words"
    )
    return el("p", f"{title}: {count(len(changed), 'choice')} changed.") + body + log


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> Markup:
    listed = [
        (
            r["backend"],
            r["gpu"],
            r["profile"],
            mark(r["status"], sections.SIGNS.get(r["status"], ""), r["status"], seen=True),
            f"{r['nodes']:,}",
            f"{r['buckets']:,}",
        )
        for r in rows[:_MOST]
    ]
    if not listed:
        return Markup("")
    headings = ("backend", "GPU model", "profile", "verdict", "nodes", "buckets")
    said = _first("Verdicts of all runs: on how many nodes and in how many buckets", rows)
    return table(said, headings, listed, (4, 5))


def _slow(rows: Sequence[Mapping[str, Any]]) -> Markup:
    if not rows:
        return Markup("")
    listed = [
        (
            _code(r["device"], 42),
            _code(r["node"]),
            r["backend"],
            f"{r['factor']:.3f}",
            f"{r['z']:g}",
            r["buckets"],
        )
        for r in rows[:_MOST]
    ]
    headings = ("GPU", "node", "backend", "times the median", "z", "buckets")
    return table(_first("Slower than their like", rows), headings, listed, (3, 4, 5))


def _disagreements(rows: Sequence[Mapping[str, Any]]) -> Markup:
    if not rows:
        return Markup("")
    listed = [
        (
            f"m {heatmap.range_text(r['m_lo'], r['m_hi'])}, n {r['n']}, k {r['k']}",
            f"{r['gpu']}, {r['profile']}",
            ", ".join(f"{c['backend']} on {count(c['nodes'], 'node')}" for c in r["choices"]),
        )
        for r in rows[:_MOST]
    ]
    caption = _first("Nodes with the same environments that chose differently", rows)
    body = table(caption, ("bucket", "GPU model, profile", "choices"), listed, class_="words")
    return details(
        ("Disagreements", el("span", f" ({len(rows)})", class_="soft")), body, open_=True
    )
