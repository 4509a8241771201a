"""Tables a person understands, made from the same rows that are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ...cache.rows import BucketKey, Candidate, Choice
from ...machine.devices import Target
from ..wording import WEIGHTS, layer_text, range_text, verdict_word, without_name
from .console import console, lines, styled, table
from .findings import shorter

_MARKS = {"unsafe": (" ✗", "red"), "inconclusive": (" ?", ""), "unsupported": (" -", "")}
_MOST_BOUNDS = 60


def print_choices(out: Console, choices: Sequence[Choice], candidates: Sequence[Candidate]) -> None:
    """One table a layer: per m range the choice, and every candidate's microseconds."""
    by_bucket: dict[BucketKey, dict[str, Candidate]] = {}
    for candidate in candidates:
        by_bucket.setdefault(candidate.bucket, {})[candidate.backend] = candidate
    layers: dict[tuple[str, int, int], list[Choice]] = {}
    for choice in choices:
        b = choice.bucket
        layers.setdefault((layer_text(b), b.n, b.k), []).append(choice)
    for (title, n, k), rows in layers.items():
        names = list(dict.fromkeys(c for row in rows for c in by_bucket.get(row.bucket, {})))
        # Names that do not fit beside each other are broken where they have dashes.
        wide = 30 + sum(len(name) + 3 for name in (names[0], *names) if names)
        narrow = wide > out.width
        headings = [_name_over_lines(name) if narrow else styled(name) for name in names]
        rows_of = "m" if rows[0].bucket.groups == 1 else "tokens"
        counts = [] if narrow else ["launches"]
        made = table(
            f"{title}  n={n} k={k}  (microseconds per launch)",
            (rows_of, "choice", *counts, *headings),
            (rows_of, *counts, *headings),
        )
        for row in rows:
            group = by_bucket.get(row.bucket, {})
            cells = [_verdict_cell(group.get(name), name == row.backend, narrow) for name in names]
            launches = "" if row.status == "none" else str(row.launches)
            made.add_row(
                range_text(row.bucket.m_lo, row.bucket.m_hi),
                _choice_text(row),
                *([] if narrow else [launches]),
                *cells,
            )
        out.print(made)
    counted = "   launches: the fewest checked in any regime the choice passed"
    legend = "✗ unsafe   ? inconclusive   * under conditions"
    out.print(legend if out.width < len(legend + counted) else legend + counted, style="dim")


def _name_over_lines(name: str) -> Text:
    """A name over several lines, broken behind its dashes."""
    *parts, last = name.split("-")
    return lines(*(f"{part}-" for part in parts), last)


def _choice_text(choice: Choice) -> Text:
    if choice.status == "none":
        return styled(("none safe", "red"))
    return styled((choice.backend, "green"), " *" if choice.conditions else "")


def _verdict_cell(candidate: Candidate | None, chosen: bool, narrow: bool = False) -> Text:
    if candidate is None:
        return styled()
    time = "·" if candidate.median_us is None else f"{candidate.median_us:.1f}"
    mark, style = _MARKS.get(verdict_word(candidate), ("", ""))
    return styled((time, "bold" if chosen else ""), (mark.strip() if narrow else mark, style))


def print_backends(
    out: Console, candidates: Sequence[Candidate], build_seconds: Mapping[str, float] | None = None
) -> None:
    """One row a backend: verdicts over all buckets, widths, launches, conditions."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.backend, []).append(candidate)
    headings = ("backend", "buckets", "verdicts", "width", "conditions and reasons", "build s")
    made = table("Backends", headings, ("build s",))
    for name, group in groups.items():
        verdicts = Counter(verdict_word(c) for c in group)
        widths = sorted({c.width for c in group if c.width is not None})
        notes = Counter(
            note
            for c in group
            for note in (*(x["text"] for x in c.conditions), *c.reasons, without_name(c))
            if note
        )
        seconds = (build_seconds or {}).get(name)
        made.add_row(
            name,
            str(len(group)),
            ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()),
            ", ".join(map(str, widths)),
            "; ".join(f"{note} ({count})" for note, count in notes.most_common(6)),
            "" if seconds is None else f"{seconds:.1f}",
        )
    out.print(made)


def print_bounds(out: Console, choices: Sequence[Choice]) -> None:
    """What is known of the failure rate of every kernel chosen, regime by regime."""
    kernels: dict[tuple[str, ...], Choice] = {}
    for choice in choices:
        if choice.bounds:
            key = (choice.backend, choice.tactic, choice.bucket.format, choice.bucket.activation)
            kernels.setdefault((*key, str(sorted(choice.bounds.items()))), choice)
    if not kernels:
        return
    numbers = ("launches", "problems", "failure rate below")
    title = "How sure: failure rates of the kernels chosen, in each regime by itself"
    made = table(title, ("backend", "tactic", "regime", *numbers), numbers)
    rows = [(c, regime, bound) for c in kernels.values() for regime, bound in c.bounds.items()]
    for choice, regime, bound in rows[:_MOST_BOUNDS]:
        made.add_row(
            choice.backend,
            shorter(choice.tactic),
            regime,
            f"{bound['launches']:,}",
            f"{bound['problems']:,}",
            f"{bound['upper']:.2g} ({100 * bound['confidence']:g} %)",
        )
    out.print(made)
    if len(rows) > _MOST_BOUNDS:
        out.print(f"and {len(rows) - _MOST_BOUNDS} more; see fp4tune show --json")


def print_reasons(out: Console, title: str, reasons: Mapping[str, str]) -> None:
    """Backends and why each is left out; nothing where none is."""
    if reasons:
        made = table(title, ("backend", "reason"))
        for name, reason in reasons.items():
            made.add_row(name, reason)
        out.print(made)


def print_support(target: Target, rows: Iterable[Mapping[str, Any]]) -> None:
    """What `support.rows` found."""
    headings = ("backend", "status", "takes", "layout", "formats", "last probe", "reason")
    made = table(f"Backends on {target.name} ({target.device.arch})", headings)
    for row in rows:
        colour = {"supported": "green", "broken": "red"}.get(row["status"], "yellow")
        aside = " (reference)" if row.get("reference_line") else ""
        made.add_row(
            row["name"],
            styled((row["status"], colour), aside),
            WEIGHTS.get(row.get("activation", ""), "") + (" experts" if row.get("experts") else ""),
            row.get("layout", ""),
            " ".join(row.get("formats", ())),
            row["last"] or "",
            row.get("reason") or "",
        )
    console().print(made)
