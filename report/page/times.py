"""Times and verdicts of candidates: a chart and a table for each layer, a row for each backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...cache.rows import BucketKey, Candidate, Choice
from ..numbers import micro
from ..wording import layer_text, range_text, scope_text, verdict_word, without_name
from .chart import Chart, chart
from .heatmap import DASH, BackendNames, condition_text

_MOST_LAYERS = 120
"""Layers whose times are shown in full; the heat maps have all of them."""
_MOST_NOTES = 12


@dataclass(frozen=True, slots=True)
class TimeCell:
    """A candidate's median and interval. `verdict` is empty for rows of many GPUs."""

    time: str
    between: str
    verdict: str
    chosen: bool


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """A layer's chart and table: backends across, ranges of m down."""

    title: str
    kind: str
    chart: Chart | None
    backends: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[TimeCell, ...], ...]], ...]


@dataclass(frozen=True, slots=True)
class ScopeTimes:
    """Of one scope, and how many layers are left out. `spread` says what intervals are."""

    title: str
    layers: tuple[LayerTimes, ...]
    more: int
    spread: str
    pooled: bool


@dataclass(frozen=True, slots=True)
class BackendVerdicts:
    """A backend over all buckets: verdicts with their counts, widths, notes with theirs."""

    name: str
    verdicts: tuple[tuple[str, int], ...]
    widths: str
    notes: tuple[tuple[str, int], ...]
    more: int


@dataclass(frozen=True, slots=True)
class ScopeVerdicts:
    title: str
    rows: tuple[BackendVerdicts, ...]


def scope_times(
    scope: tuple[str, str, str],
    choices: Sequence[Choice],
    candidates: Sequence[Candidate],
    known: BackendNames,
    spread: str = "",
) -> ScopeTimes:
    """With `spread` the rows are of many GPUs and carry no verdict; it says what their interval
    is."""
    taken = {c.bucket: c for c in choices}
    layers: dict[tuple[str, int, int], list[Candidate]] = {}
    for candidate in candidates:
        b = candidate.bucket
        layers.setdefault((layer_text(b), b.n, b.k), []).append(candidate)
    shown = [
        LayerTimes(
            f"n {n}, k {k}", kind, chart(some, known), *_times_table(some, taken, known, spread)
        )
        for (kind, n, k), some in sorted(layers.items())[:_MOST_LAYERS]
    ]
    said = spread or "median, below it an interval of it"
    more = len(layers) - len(shown)
    return ScopeTimes(scope_text(*scope), tuple(shown), more, said, bool(spread))


def _times_table(
    candidates: Sequence[Candidate],
    taken: Mapping[BucketKey, Choice],
    known: BackendNames,
    spread: str,
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[tuple[TimeCell, ...], ...]], ...]]:
    here = {c.backend for c in candidates}
    backends = [name for name in known.order if name in here]
    by_bucket: dict[BucketKey, dict[str, list[Candidate]]] = {}
    for c in candidates:
        by_bucket.setdefault(c.bucket, {}).setdefault(c.backend, []).append(c)
    rows = []
    for bucket in sorted(by_bucket, key=lambda b: (b.m_lo, b.m_hi)):
        row, choice = by_bucket[bucket], taken.get(bucket)
        cells = tuple(
            tuple(_time_cell(c, choice, bool(spread)) for c in row.get(name, ()))
            for name in backends
        )
        rows.append((range_text(bucket.m_lo, bucket.m_hi, DASH), cells))
    return tuple(f"{known.letter(name)} {name}" for name in backends), tuple(rows)


def _time_cell(c: Candidate, choice: Choice | None, pooled: bool) -> TimeCell:
    is_chosen = (
        choice is not None
        and choice.status != "none"
        and choice.backend == c.backend
        and (pooled or choice.tactic == c.tactic)
    )
    between = ""
    if c.lo_us is not None and c.hi_us is not None:
        between = f"{micro(c.lo_us)}{DASH}{micro(c.hi_us)}"
    return TimeCell(micro(c.median_us), between, "" if pooled else verdict_word(c), is_chosen)


def scope_verdicts(
    scope: tuple[str, str, str], candidates: Sequence[Candidate], known: BackendNames
) -> ScopeVerdicts:
    """A row for each backend: verdicts over all buckets, widths, conditions and reasons."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.backend, []).append(candidate)
    rows = []
    for name in known.order:
        group = groups.get(name, [])
        if not group:
            continue
        verdicts = Counter(verdict_word(c) for c in group)
        widths = sorted({c.width for c in group if c.width is not None})
        notes = Counter(
            note
            for c in group
            for note in (*map(condition_text, c.conditions), *map(str, c.reasons), without_name(c))
            if note
        ).most_common()
        rows.append(
            BackendVerdicts(
                f"{known.letter(name)} {name}",
                tuple(verdicts.items()),
                ", ".join(map(str, widths)),
                tuple(notes[:_MOST_NOTES]),
                max(0, len(notes) - _MOST_NOTES),
            )
        )
    return ScopeVerdicts(scope_text(*scope), tuple(rows))
