"""Choices by bucket as heat maps: a row for each range of m, a column for each layer (n, k)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ...autotune.choice.rank import FLOORS
from ...cache.rows import BucketKey, Candidate, Choice
from . import style
from .markup import Child, captioned, clean, details, el, scrolling
from .numbers import micro, positive, ratio
from .page import key

Kind = tuple[str, str, str, int]
"""Format, activation, output dtype and groups: what one map is of."""


@dataclass(frozen=True, slots=True)
class Names:
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


def names(choices: Sequence[Choice], candidates: Iterable[Candidate]) -> Names:
    """The backends of some rows, those chosen most often first."""
    counted: dict[str, int] = {}
    for choice in choices:
        if choice.status != "none":
            counted[choice.backend] = counted.get(choice.backend, 0) - 1
    for candidate in candidates:
        counted.setdefault(candidate.backend, 0)
    return Names(tuple(sorted(counted, key=lambda name: (counted[name], name))))


def kind(bucket: BucketKey) -> Kind:
    return bucket.format, bucket.activation, bucket.out_dtype, bucket.groups


def kind_text(of: Kind) -> str:
    """As in ``nvfp4 W4A16 bf16``."""
    weights = {"bf16": "W4A16", "fp4": "W4A4"}.get(of[1], of[1])
    return f"{of[0]} {weights} {of[2]}" + (f", {of[3]} groups" if of[3] != 1 else "")


def range_text(lo: int, hi: int) -> str:
    return str(hi) if lo == hi else f"{lo}\u2013{hi}"


def grid(caption: Child, cells: Mapping[BucketKey, Markup], label: str) -> Markup:
    """A map of ready ``td`` by bucket. A bucket that is not there is an empty cell."""
    layers = sorted({(b.n, b.k) for b in cells})
    ranges = sorted({(b.m_lo, b.m_hi) for b in cells})
    by_place = {(b.m_lo, b.m_hi, b.n, b.k): cell for b, cell in cells.items()}
    head = el(
        "tr",
        el("th", "m", scope="col"),
        [el("th", f"n {n}", el("br"), f"k {k}", scope="col") for n, k in layers],
    )
    body = [
        el(
            "tr",
            el("th", range_text(lo, hi), scope="row", class_="num"),
            [by_place.get((lo, hi, n, k)) or el("td", "") for n, k in layers],
        )
        for lo, hi in ranges
    ]
    content = captioned(caption), el("thead", head), el("tbody", body)
    return scrolling(label, el("table", content, class_="heat"))


def by_kind(choices: Iterable[Choice]) -> dict[Kind, list[Choice]]:
    found: dict[Kind, list[Choice]] = {}
    for choice in choices:
        found.setdefault(kind(choice.bucket), []).append(choice)
    return found


def chosen(choices: Sequence[Choice], known: Names) -> Markup:
    """Which backend each bucket has, by letter and colour, with its time in microseconds."""

    def cell(choice: Choice) -> Markup:
        if choice.status == "none":
            return el("td", el("b", "✗"), "none", class_="none")
        floor = " floor" if choice.status == "floor" else ""
        star = "*" if choice.conditions else ""
        note = el("span", " floor", class_="span") if floor else None
        said = el("span", f" {choice.backend}, ", class_="vh")
        time = "" if choice.median_us is None else micro(choice.median_us)
        letter = el("b", known.letter(choice.backend) + star, said)
        return el("td", letter, time, note, class_=f"rel {known.swatch(choice.backend)}{floor}")

    caption = "The backend chosen, and its time per call in microseconds"
    return grid(caption, {c.bucket: cell(c) for c in choices}, caption)


def legend(choices: Sequence[Choice], known: Names) -> Markup:
    """What the letters and signs of `chosen` mean."""
    rows: list[tuple[Child, str, Child]] = [
        (known.letter(name), known.swatch(name), name)
        for name in known.order
        if any(c.backend == name and c.status != "none" for c in choices)
    ]
    if any(c.status == "none" for c in choices):
        rows.append(("✗", "none", "nothing is safe here"))
    if any(c.conditions for c in choices):
        rows.append(("*", "", "safe under conditions, listed below"))
    return key(rows)


def gain(choices: Sequence[Choice], candidates: Iterable[Candidate]) -> Markup:
    """How many times faster than the floor each choice is; nothing where neither was timed."""
    floors: dict[BucketKey, float] = {}
    for candidate in candidates:
        us = positive(candidate.median_us)
        if candidate.backend in FLOORS and us:
            floors[candidate.bucket] = us
    cells: dict[BucketKey, Markup] = {}
    for choice in choices:
        floor, us = floors.get(choice.bucket), positive(choice.median_us)
        if choice.status == "none" or not floor or not us:
            cells[choice.bucket] = el("td", "·")
            continue
        times = floor / us
        cells[choice.bucket] = el("td", f"{ratio(times)}×", class_=f"s{_step(times)}")
    if not any("×" in cell for cell in cells.values()):
        return Markup("")
    caption = "How many times faster than the floor, dequantise and multiply"
    return grid(caption, cells, caption)


def _step(times: float) -> int:
    """A shade for a speed-up: 1 or less is the lightest, 16 and more the strongest."""
    limits = (1.05, 1.5, 2.0, 4.0, 8.0, 16.0)
    return sum(times >= limit for limit in limits)


def shaded(rate: float) -> str:
    """The class for an upper bound of a failure rate: the lower, the stronger."""
    limits = (0.3, 0.1, 0.03, 0.01, 0.001, 0.0001)
    return f"s{sum(rate <= limit for limit in limits)}"


def bounds(choices: Sequence[Choice], known: Names) -> Markup:
    """What is known of the failure rate of the kernels chosen, regime by regime: the loosest and
    the tightest bound of each backend, and folded below, those of every kernel."""
    kernels: dict[tuple[str, ...], list[Choice]] = {}
    for choice in choices:
        if choice.bounds and choice.status != "none":
            place = (choice.backend, choice.tactic, str(sorted(choice.bounds.items())))
            kernels.setdefault(place, []).append(choice)
    if not kernels:
        return Markup("")
    firsts = [group[0] for group in kernels.values()]
    regimes = sorted({str(name) for c in firsts for name in c.bounds})
    backends = [name for name in known.order if any(c.backend == name for c in firsts)]
    rows = [
        el(
            "tr",
            el("th", regime, scope="row"),
            [_range(regime, [c for c in firsts if c.backend == name]) for name in backends],
        )
        for regime in regimes
    ]
    head = [el("th", f"{known.letter(name)} {name}", scope="col") for name in backends]
    sure = _confidence(firsts)
    caption = f"Failure rates are below{sure}: the loosest bound of any kernel chosen; the tightest"
    summary = _heat(caption, el("tr", el("th", "regime", scope="col"), head), rows)
    body = [
        el(
            "tr",
            el("th", _kernel(group, known), scope="row", class_="long"),
            [_bound(group[0].bounds.get(regime)) for regime in regimes],
        )
        for group in kernels.values()
    ]
    each = f"Failure rates are below{sure}; under each bound: problems that failed"
    head = [el("th", regime, scope="col") for regime in regimes]
    whole = _heat(each, el("tr", el("th", "kernel", scope="col"), head), body)
    title = "Every kernel", el("span", f" ({len(kernels)})", class_="soft")
    return summary + details(title, whole)


def _confidence(group: Sequence[Choice]) -> str:
    """At how much confidence bounds are, where they say so and all say the same."""
    said: set[float] = set()
    for choice in group:
        for bound in choice.bounds.values():
            try:
                said.add(float(bound["confidence"]))
            except (KeyError, TypeError, ValueError, OverflowError):
                return ""
    return f" ({100 * said.pop():g} %)" if len(said) == 1 else ""


def _heat(caption: str, head: Markup, body: Sequence[Markup]) -> Markup:
    content = captioned(caption), el("thead", head), el("tbody", body)
    return scrolling(caption, el("table", content, class_="heat"))


def _kernel(group: Sequence[Choice], known: Names) -> Markup:
    """A compiled kernel by its backend and tactic, and the buckets that have it."""
    first = group[0]
    layers = sorted({(c.bucket.n, c.bucket.k) for c in group})
    m = range_text(min(c.bucket.m_lo for c in group), max(c.bucket.m_hi for c in group))
    where = ", ".join(f"n {n} k {k}" for n, k in layers[:3])
    where += f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return el(
        "span",
        el("b", f"{known.letter(first.backend)} "),
        clean(first.tactic, 200),
        el("span", f"{where}, m {m}", class_="span"),
    )


def _range(regime: str, group: Sequence[Choice]) -> Markup:
    uppers = []
    for choice in group:
        try:
            uppers.append(float(choice.bounds[regime]["upper"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    if not uppers:
        return el("td", "·")
    loose, tight = max(uppers), min(uppers)
    span = None if loose == tight else el("span", f"to {tight:.2g}", class_="span")
    return el("td", f"{loose:.2g}", span, class_=shaded(loose))


def _bound(known: object) -> Markup:
    if known is None:
        return el("td", "·")
    try:
        upper = float(known["upper"])  # type: ignore[index]
        problems, failures = int(known["problems"]), int(known["failures"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError, OverflowError):
        return el("td", "not understood", class_="bad")
    span = el("span", f"{failures} of {problems:,}", class_="span")
    return el("td", f"{upper:.2g}", span, class_="bad" if failures else shaded(upper))
