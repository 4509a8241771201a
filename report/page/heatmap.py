"""Choices by bucket as heat maps: a row for each range of m, a column for each layer (n, k)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...autotune.choice.rank import FLOORS
from ...autotune.verdict.statistics import failure_bound
from ...cache.rows import BucketKey, Candidate, Choice
from .. import roofline
from ..numbers import micro, positive, ratio
from ..wording import layer_text, range_text, scope_text
from . import style

DASH = "\u2013"


@dataclass(frozen=True, slots=True)
class BackendNames:
    """Backends of a scope, each with a letter and a colour that stay the same down the page."""

    order: tuple[str, ...]

    def letter(self, backend: str) -> str:
        at = self.order.index(backend) if backend in self.order else -1
        if at < 0:
            return "?"
        return chr(65 + at % 26) + (str(at // 26) if at >= 26 else "")

    def at(self, backend: str) -> int:
        return self.order.index(backend) % style.NAMES if backend in self.order else 0

    def swatch(self, backend: str) -> str:
        return f"n{self.at(backend)}"


@dataclass(frozen=True, slots=True)
class HeatCell:
    """A square of a map: class for its colour, a letter with the name it stands for, a text, a
    smaller one below, and what more there is to say where one points at it."""

    css: str = ""
    letter: str = ""
    name: str = ""
    text: str = ""
    below: str = ""
    more: str = ""


@dataclass(frozen=True, slots=True)
class HeatGrid:
    """A map: layers (n, k) across, ranges of m down, None where there is no such bucket."""

    caption: str
    layers: tuple[tuple[int, int], ...]
    rows: tuple[tuple[str, tuple[HeatCell | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class Maps:
    """The maps of one kind of layer, side by side, and what their letters mean: sign, class,
    meaning."""

    title: str
    legend: tuple[tuple[str, str, str], ...]
    grids: tuple[HeatGrid, ...]


@dataclass(frozen=True, slots=True)
class ScopeMaps:
    """All maps of one GPU model and profile, and the conditions they rest on: backend, what, in
    how many buckets."""

    title: str
    kinds: tuple[Maps, ...]
    conditions: tuple[tuple[str, str, int], ...] = ()


def names(choices: Sequence[Choice], candidates: Iterable[Candidate]) -> BackendNames:
    """The backends of some rows, those chosen most often first."""
    counted: dict[str, int] = {}
    for choice in choices:
        if choice.status != "none":
            counted[choice.backend] = counted.get(choice.backend, 0) - 1
    for candidate in candidates:
        counted.setdefault(candidate.backend, 0)
    return BackendNames(tuple(sorted(counted, key=lambda name: (counted[name], name))))


def by_kind(choices: Iterable[Choice]) -> dict[str, list[Choice]]:
    """Choices by what `layer_text` says of their layer."""
    found: dict[str, list[Choice]] = {}
    for choice in choices:
        found.setdefault(layer_text(choice.bucket), []).append(choice)
    return found


def scope_maps(
    scope: tuple[str, str, str],
    choices: Sequence[Choice],
    candidates: Sequence[Candidate],
    known: BackendNames,
) -> ScopeMaps:
    """Of one node and scope: what is chosen, what it gains, and on what conditions."""
    kinds = []
    for kind, some in by_kind(choices).items():
        mine = [c for c in candidates if layer_text(c.bucket) == kind]
        grids = [chosen(some, known), gain(some, mine)]
        title = f"Experts: {kind}" if some[0].bucket.groups != 1 else kind
        kinds.append(Maps(title, legend(some, known), tuple(g for g in grids if g)))
    counted = Counter(
        (choice.backend, condition_text(c)) for choice in choices for c in choice.conditions
    )
    conditions = tuple((*key, times) for key, times in counted.most_common())
    return ScopeMaps(scope_text(*scope), tuple(kinds), conditions)


def condition_text(condition: Any) -> str:
    """A condition of a verdict in words."""
    if isinstance(condition, Mapping):
        return str(condition.get("text", condition.get("id", condition)))
    return str(condition)


def grid(caption: str, cells: Mapping[BucketKey, HeatCell]) -> HeatGrid:
    layers = sorted({(b.n, b.k) for b in cells})
    ranges = sorted({(b.m_lo, b.m_hi) for b in cells})
    by_place = {(b.m_lo, b.m_hi, b.n, b.k): cell for b, cell in cells.items()}
    rows = (
        (range_text(lo, hi, DASH), tuple(by_place.get((lo, hi, *layer)) for layer in layers))
        for lo, hi in ranges
    )
    return HeatGrid(caption, tuple(layers), tuple(rows))


def chosen(choices: Sequence[Choice], known: BackendNames) -> HeatGrid:
    """Which backend each bucket has, by letter and colour, with its time in microseconds."""

    def cell(choice: Choice) -> HeatCell:
        if choice.status == "none":
            return HeatCell("none", "✗", text="none")
        floor = choice.status == "floor"
        return HeatCell(
            f"rel {known.swatch(choice.backend)}{' floor' if floor else ''}",
            known.letter(choice.backend) + ("*" if choice.conditions else ""),
            choice.backend,
            "" if choice.median_us is None else micro(choice.median_us),
            "floor" if floor else "",
            told(choice),
        )

    caption = "The backend chosen, and its time per call in microseconds"
    return grid(caption, {c.bucket: cell(c) for c in choices})


def told(choice: Choice) -> str:
    """What is known of a choice beside its time: its share of the roofline, and the failure rate
    that its launches bound in the regime where that is least sure."""
    b = choice.bucket
    tactic = "" if choice.tactic == "default" else f" {choice.tactic}"
    parts = [f"m {range_text(b.m_lo, b.m_hi, DASH)}, n {b.n}, k {b.k}: {choice.backend}{tactic}"]
    if us := positive(choice.median_us):
        parts.append(f"{micro(us)} microseconds")
    reached = roofline.share(choice.gpu, b, choice.median_us)
    if reached is not None:
        parts.append(f"{100 * reached:.0f} % of the roofline")
    bounds = choice.bounds.items() if isinstance(choice.bounds, Mapping) else ()
    known = [
        (upper, str(regime))
        for regime, bound in bounds
        if isinstance(bound, Mapping) and (upper := positive(bound.get("upper")))
    ]
    if known:
        upper, regime = max(known)
        parts.append(f"a failure rate below {upper:.2g} where it is least sure, {regime}")
    elif choice.problems:
        upper = failure_bound(choice.problems)
        parts.append(f"a failure rate below {upper:.2g} (95 %) in each regime")
    return "; ".join(parts)


def legend(choices: Sequence[Choice], known: BackendNames) -> tuple[tuple[str, str, str], ...]:
    """What the letters and signs of `chosen` mean."""
    rows = [
        (known.letter(name), known.swatch(name), name)
        for name in known.order
        if any(c.backend == name and c.status != "none" for c in choices)
    ]
    if any(c.status == "none" for c in choices):
        rows.append(("✗", "none", "dashed: nothing is safe here"))
    if any(c.status == "floor" for c in choices):
        rows.append(("A", "floor", "dotted: the floor, since nothing faster is safe"))
    if any(c.conditions for c in choices):
        rows.append(("*", "", "safe under conditions, listed below"))
    return tuple(rows)


def gain(choices: Sequence[Choice], candidates: Iterable[Candidate]) -> HeatGrid | None:
    """How many times faster than the floor each choice is; None where neither was timed."""
    floors: dict[BucketKey, float] = {}
    for candidate in candidates:
        us = positive(candidate.median_us)
        if candidate.backend in FLOORS and us:
            floors[candidate.bucket] = us
    cells: dict[BucketKey, HeatCell] = {}
    for choice in choices:
        floor, us = floors.get(choice.bucket), positive(choice.median_us)
        if choice.status == "none" or not floor or not us:
            cells[choice.bucket] = HeatCell(text="·")
            continue
        times = floor / us
        cells[choice.bucket] = HeatCell(f"s{_shade_of(times)}", text=f"{ratio(times)}×")
    if not any("×" in cell.text for cell in cells.values()):
        return None
    return grid("How many times faster than the floor, dequantise and multiply", cells)


def _shade_of(times: float) -> int:
    """A shade for a speed-up: 1 or less is the lightest, 16 and more the strongest."""
    limits = (1.05, 1.5, 2.0, 4.0, 8.0, 16.0)
    return sum(times >= limit for limit in limits)
