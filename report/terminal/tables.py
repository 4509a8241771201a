"""Tables a person understands, made from the same rows that are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...autotune.evidence import audits
from ...autotune.plan import Report
from ...autotune.publication import published
from ...autotune.stages import recall
from ...autotune.verdict.statistics import failure_bound
from ...cache.rows import BucketKey, Candidate, Choice, Finding, Timing
from ...machine.devices import Target
from ...probes.check import tilemap
from ..documents import findings
from .checklist import console

_MARKS = {"safe": "", "unsafe": " [red]✗[/]", "inconclusive": " ?", "unsupported": " -"}
_MOST_FINDINGS = 40
_MOST_BOUNDS = 60
_MOST_NOTES = 6


def print_report(report: Report) -> None:
    """All of a finished probe: choices by layer, backends, findings, what could not run."""
    out = console()
    out.print(f"\n[bold]{escape(report.target.name)}[/] ({report.target.device.arch})")
    if report.candidates:
        print_choices(out, report.choices, report.candidates)
        print_backends(out, report.candidates, report.build_seconds)
        print_bounds(out, report.choices)
        print_findings(out, report.findings)
    _print_reasons(out, "Audit", audits.remarks(report.audits))
    _print_unsteady(out, report.timings)
    _print_left(out, report.left)
    _print_reasons(out, "Did not load or build", report.broken)
    _print_reasons(out, "Cannot run here", report.unsupported)
    said = recall.sentence(report.known)
    if said:
        out.print(f"\n{said}")
    if report.generation is not None:
        out.print(
            f"\nprobed in {report.seconds:.0f} s, after {report.build_wall_seconds:.0f} s of "
            f"loading and building; stored as generation {report.generation}; run {report.run}"
        )


def print_choices(out: Console, choices: Sequence[Choice], candidates: Sequence[Candidate]) -> None:
    """One table a layer: per m range the choice, and every candidate's microseconds."""
    by_bucket: dict[BucketKey, dict[str, Candidate]] = {}
    for candidate in candidates:
        by_bucket.setdefault(candidate.bucket, {})[candidate.backend] = candidate
    layers: dict[tuple[str, str, str, int, int], list[Choice]] = {}
    for choice in choices:
        b = choice.bucket
        layers.setdefault((b.format, b.activation, b.out_dtype, b.n, b.k), []).append(choice)
    for (format_, activation, dtype, n, k), rows in layers.items():
        names = list(dict.fromkeys(c for row in rows for c in by_bucket[row.bucket]))
        weights = "W4A16" if activation == "bf16" else "W4A4"
        title = f"{format_} {weights} {dtype}  n={n} k={k}  (microseconds per launch)"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("m", justify="right")
        table.add_column("choice")
        table.add_column("launches", justify="right")
        for name in names:
            table.add_column(name, justify="right")
        for row in rows:
            group = by_bucket[row.bucket]
            cells = [_cell(group.get(name), name == row.backend) for name in names]
            launches = "" if row.status == "none" else str(row.launches)
            table.add_row(_range(row.bucket), _chosen(row), launches, *cells)
        out.print(table)
    out.print(
        "✗ unsafe   ? inconclusive   launches: the fewest checked in any regime the choice passed",
        style="dim",
    )


def _range(bucket: BucketKey) -> str:
    lo, hi = bucket.m_lo, bucket.m_hi
    return str(hi) if lo == hi else f"{lo}-{hi}"


def _chosen(choice: Choice) -> str:
    if choice.status == "none":
        return "[red]none safe[/]"
    conditional = " (conditions)" if choice.conditions else ""
    return f"[green]{escape(choice.backend)}[/]{conditional}"


def _cell(candidate: Candidate | None, chosen: bool) -> str:
    if candidate is None:
        return ""
    text = "·" if candidate.median_us is None else f"{candidate.median_us:.1f}"
    mark = _MARKS.get(_verdict(candidate), "")
    return (f"[bold]{text}[/]" if chosen else text) + mark


def _verdict(candidate: Candidate) -> str:
    """A reference line is measured and never judged: its verdict is not a mark against it."""
    reference = any("reference line" in reason for reason in candidate.reasons)
    return "reference" if reference else candidate.verdict


def print_backends(
    out: Console, candidates: Sequence[Candidate], build_seconds: dict[str, float] | None = None
) -> None:
    """One row a backend: verdicts over all buckets, widths, launches, conditions."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.backend, []).append(candidate)
    table = Table(title="Backends", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("backend", "buckets", "verdicts", "width", "conditions and reasons"):
        table.add_column(heading)
    table.add_column("build s", justify="right")
    for name, group in groups.items():
        verdicts = Counter(_verdict(c) for c in group)
        widths = sorted({c.width for c in group if c.width is not None})
        notes = Counter(
            note for c in group for note in (*(x["text"] for x in c.conditions), *c.reasons)
        )
        seconds = (build_seconds or {}).get(name)
        table.add_row(
            escape(name),
            str(len(group)),
            ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()),
            ", ".join(map(str, widths)),
            escape("; ".join(f"{note} ({count})" for note, count in notes.most_common(6))),
            "" if seconds is None else f"{seconds:.1f}",
        )
    out.print(table)
    fewest = min((c.problems for c in candidates if c.verdict == "safe"), default=0)
    if fewest:
        out.print(
            f"Every safe verdict: no failure in at least {fewest} problems per bucket and regime, "
            f"a failure rate below {failure_bound(fewest):.1g} (95 %) under that regime alone.",
            style="dim",
        )


def print_bounds(out: Console, choices: Sequence[Choice]) -> None:
    """What is known of the failure rate of every kernel chosen, regime by regime."""
    kernels: dict[tuple[str, ...], Choice] = {}
    for choice in choices:
        if choice.bounds:
            key = (choice.backend, choice.tactic, choice.bucket.format, choice.bucket.activation)
            kernels.setdefault((*key, str(sorted(choice.bounds.items()))), choice)
    if not kernels:
        return
    title = "How sure: failure rates of the kernels chosen, in each regime by itself"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("backend")
    table.add_column("tactic")
    table.add_column("regime")
    for heading in ("launches", "problems", "failure rate below"):
        table.add_column(heading, justify="right")
    rows = [(c, regime, bound) for c in kernels.values() for regime, bound in c.bounds.items()]
    for choice, regime, bound in rows[:_MOST_BOUNDS]:
        table.add_row(
            escape(choice.backend),
            escape(_shorter(choice.tactic)),
            regime,
            f"{bound['launches']:,}",
            f"{bound['problems']:,}",
            f"{bound['upper']:.2g} ({100 * bound['confidence']:g} %)",
        )
    out.print(table)
    if len(rows) > _MOST_BOUNDS:
        out.print(f"and {len(rows) - _MOST_BOUNDS} more; see fp4tune show --json")


def print_finding(out: Console, finding: Finding) -> None:
    """One finding in full: its number, what was seen, a diagnosis, and the wrong tiles."""
    name = f"{finding.backend} {finding.tactic}"
    where = f"{finding.kind}, {finding.regime}, {finding.data} data"
    number = "" if finding.id is None else f"#{finding.id} "
    out.print(f"{number}{escape(name)}: {where}: {escape(describe(finding))}")
    detail = finding.detail
    if detail.get("diagnosis"):
        out.print(f"    {escape(str(detail['diagnosis']))}", style="dim")
    retest = detail.get("retest") or {}
    if retest.get("launches"):
        low, high = retest["rate"]
        out.print(
            f"    tried again: {retest['kind']}, {retest['failures']} of {retest['launches']} "
            f"launches failed, a rate of {low:.2g} to {high:.2g} (95 %)",
            style="dim",
        )
    try:
        tiles = tilemap.unpack(detail["map"])
    except (KeyError, ValueError):
        return
    if tiles.rows * tiles.cols > 1:
        for line in tilemap.text(tiles, height=8).splitlines():
            out.print(f"    {line}", style="dim")


def print_findings(out: Console, findings: Sequence[Finding]) -> None:
    """Findings of one kind together: where, how many, and one in full."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.backend, finding.kind, finding.regime, finding.data)
        groups.setdefault(key, []).append(finding)
    if not groups:
        out.print("No findings.")
        return
    table = Table(title="Findings", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("backend", "kind", "regime", "data", "buckets", "tactics", "first of them"):
        table.add_column(heading)
    for (backend, kind, regime, data), group in list(groups.items())[:_MOST_FINDINGS]:
        row = (backend, kind, regime, data, str(len({f.bucket for f in group})))
        tactics = _some([f.tactic for f in group])
        first = group[0]
        said = "" if first.id is None else f"#{first.id} "
        said += describe(first)
        if first.detail.get("diagnosis"):
            said += f"\n{first.detail['diagnosis']}"
        table.add_row(*(escape(cell) for cell in (*row, tactics, said)))
    out.print(table)
    if len(groups) > _MOST_FINDINGS:
        out.print(f"and {len(groups) - _MOST_FINDINGS} more kinds; see fp4tune show --findings")


def _some(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - 1} more" if len(unique) > 1 else ""
    return _shorter(unique[0]) + more


def _shorter(name: str) -> str:
    return name if len(name) <= 32 else name[:31] + "…"


def describe(finding: Finding) -> str:
    """One finding in a line: the problem, and the worst element or what was raised."""
    p, d = finding.problem, finding.detail
    text = f"m={p['m']} n={p['n']} k={p['k']}"
    if "message" in d:
        return f"{text}: {d['message']}"
    if "worst" in d:
        worst = d["worst"]
        low, high = worst["expected"]
        expected = f"{low}" if low == high else f"{low} to {high}"
        where = f"[{worst['row']}, {worst['col']}]"
        text += f": {where} is {worst['found']}, expected {expected}"
    if d.get("tile_error") is not None:
        text += f": relative tile error {float(d['tile_error']):.2g}"
    if d.get("guard"):
        text += f": {d['guard']} elements written outside the output"
    return f"{text}; data seed {finding.seed}"


def _print_reasons(out: Console, title: str, reasons: dict[str, str]) -> None:
    if not reasons:
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("backend")
    table.add_column("reason")
    for name, reason in reasons.items():
        table.add_row(escape(name), escape(reason))
    out.print(table)


def _print_unsteady(out: Console, timings: Sequence[Timing]) -> None:
    """Times that say of themselves that they are not to be trusted: each note once, with whose."""
    notes: dict[tuple[int, int, str], dict[str, None]] = {}
    for row in timings:
        if note := row.detail.get("note"):
            notes.setdefault((row.bucket.n, row.bucket.k, str(note)), {})[row.backend] = None
    for (n, k, note), backends in list(notes.items())[:_MOST_NOTES]:
        out.print(escape(f"Unsteady times, n={n} k={k} ({', '.join(backends)}): {note}"))
    if len(notes) > _MOST_NOTES:
        out.print(f"and {len(notes) - _MOST_NOTES} more; --json has them under timings")


def _print_left(out: Console, left: Sequence[Mapping[str, Any]]) -> None:
    """What the time budget did not reach."""
    for row in left:
        ranges = ", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in row["m"])
        weights = "W4A16" if row["activation"] == "bf16" else "W4A4"
        out.print(
            f"The time budget ended before anything was proven in {row['format']} {weights} "
            f"n={row['n']} k={row['k']} at m={ranges}; what stood there stands, and the next probe "
            "goes on there"
        )


def print_stored(place: Path, every_finding: bool) -> None:
    """Choices, verdicts, findings and environments of a state directory."""
    out = console()
    stored = published.load(place)
    found, runs = findings(place)
    out.print(f"{escape(str(place))}: generation {stored.generation}")
    scopes = published.by_scope(stored.candidates)
    for (arch, gpu, profile), candidates in scopes.items():
        out.print(f"\n[bold]{escape(gpu)}[/] ({arch}), profile {profile}")
        mine = [c for c in stored.choices if c.scope == (arch, gpu, profile)]
        print_choices(out, mine, candidates)
        print_backends(out, candidates)
        print_bounds(out, mine)
    if every_finding:
        for finding in found:
            print_finding(out, finding)
    else:
        print_findings(out, found)
    _print_reasons(out, "Cannot run here", stored.meta.get("unsupported", {}))
    table = Table(title="Environments", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("backend", "fingerprint", "versions", "code digest"):
        table.add_column(heading)
    for environment in stored.environments:
        facts = environment.facts
        versions = ", ".join(f"{k} {v}" for k, v in facts["distributions"].items())
        code = facts.get("code") or facts.get("code_how") or ""
        table.add_row(
            escape(environment.backend), environment.fingerprint[:12], versions, str(code)[:40]
        )
    out.print(table)
    for run in runs[-5:]:
        out.print(f"run {run.id}: {run.status}, level {run.level}, seed {run.seed}")


def print_support(target: Target, rows: Iterable[dict]) -> None:
    """What `support.rows` found."""
    out = console()
    title = f"Backends on {escape(target.name)} ({target.device.arch})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("backend", "status", "takes", "layout", "formats", "last probe", "reason"):
        table.add_column(heading)
    for row in rows:
        colour = {"supported": "green", "broken": "red"}.get(row["status"], "yellow")
        takes = {"bf16": "W4A16", "fp4": "W4A4"}.get(row.get("activation", ""), "")
        table.add_row(
            escape(row["name"]),
            f"[{colour}]{row['status']}[/]" + (" (reference)" if row.get("reference_line") else ""),
            takes,
            row.get("layout", ""),
            " ".join(row.get("formats", ())),
            escape(row["last"] or ""),
            escape(row.get("reason") or ""),
        )
    out.print(table)
