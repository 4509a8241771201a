"""Time over m of one layer's candidates, both axes logarithmic, each median with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from ...cache.rows import Candidate
from .heatmap import Names
from .markup import el
from .numbers import positive

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 44, 34, 10, 34
_DASHES = (None, "6 3", "2 3", "8 3 2 3")
_APART = 12


def lines(candidates: Sequence[Candidate], known: Names, label: str) -> Markup:
    """A chart of those candidates that were timed; nothing where fewer than two m were.

    Each line has its backend's letter at its right end, a dash and a colour of its own.
    """
    timed = [c for c in candidates if positive(c.median_us) and c.bucket.m_hi > 0]
    ms = sorted({c.bucket.m_hi for c in timed})
    if len(ms) < 2:
        return Markup("")
    low = min(_low(c) for c in timed)
    high = max(_high(c) for c in timed)
    first, last = math.log(ms[0]), math.log(ms[-1])
    bottom, top = math.log(low) - 0.05, math.log(high) + 0.05

    def x(m: int) -> float:
        return LEFT + (math.log(m) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(us: float) -> float:
        share = (math.log(us) - bottom) / (top - bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    by_backend: dict[str, dict[int, Candidate]] = {}
    for candidate in timed:
        there = by_backend.setdefault(candidate.backend, {})
        best = there.get(candidate.bucket.m_hi)
        if best is None or _median(candidate) < _median(best):
            there[candidate.bucket.m_hi] = candidate
    parts = _axes(ms, low, high, x, y)
    ends = []
    for name in sorted(by_backend, key=lambda n: known.order.index(n) if n in known.order else 99):
        row = [by_backend[name][m] for m in sorted(by_backend[name])]
        at = known.order.index(name) if name in known.order else 0
        aside = 2.5 * (at % 5 - 2)  # so that intervals do not hide each other
        path = "".join(
            f"{'L' if i else 'M'}{x(c.bucket.m_hi):.1f} {y(_median(c)):.1f}"
            for i, c in enumerate(row)
        )
        bars = "".join(
            f"M{x(c.bucket.m_hi) + aside:.1f} {y(_low(c)):.1f}V{y(_high(c)):.1f}"
            for c in row
            if positive(c.lo_us)
        )
        class_ = f"l{known.at(name)}"
        dash = _DASHES[at % len(_DASHES)]
        parts.append(el("path", d=Markup(path), class_=class_, stroke_dasharray=dash))
        parts.append(el("path", d=Markup(bars), class_=f"{class_} bar"))
        ends.append((y(_median(row[-1])), x(row[-1].bucket.m_hi), known.letter(name)))
    parts += _letters(ends)
    return el(
        "figure",
        el("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label),
        el("figcaption", "Microseconds per call over m, both logarithmic; the table has the same."),
        class_="chart",
    )


def _axes(
    ms: Sequence[int],
    low: float,
    high: float,
    x: Callable[[int], float],
    y: Callable[[float], float],
) -> list[Markup]:
    """Grid lines with their numbers."""
    parts: list[Markup] = []
    seen = -99.0
    for m in ms:
        if x(m) - seen >= 30:
            seen = x(m)
            parts.append(el("path", d=f"M{seen:.1f} {TOP}V{HEIGHT - BOTTOM}", class_="grid"))
            parts.append(el("text", m, x=f"{seen:.1f}", y=HEIGHT - BOTTOM + 14, class_="mid"))
    parts.append(el("text", "m", x=WIDTH - RIGHT, y=HEIGHT - 4, class_="mid"))
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            us = digit * 10.0**power
            if low <= us <= high:
                parts.append(el("path", d=f"M{LEFT} {y(us):.1f}H{WIDTH - RIGHT}", class_="grid"))
                tick = (
                    f"{us:g}" if us < 1e4 else f"{us / 1000:g}k" if us < 1e6 else f"{us / 1e6:g}M"
                )
                parts.append(el("text", tick, x=LEFT - 5, y=f"{y(us) + 4:.1f}", class_="end"))
    return parts


def _letters(ends: list[tuple[float, float, str]]) -> list[Markup]:
    """Letters at the right ends of the lines, moved apart where they would lie on each other."""
    placed: list[Markup] = []
    above = -99.0
    for at, x, letter in sorted(ends):
        above = max(at + 4, above + _APART)
        placed.append(el("text", letter, x=f"{x + 6:.1f}", y=f"{above:.1f}", class_="name"))
    return placed


def _median(c: Candidate) -> float:
    return positive(c.median_us) or 1.0


def _low(c: Candidate) -> float:
    return positive(c.lo_us) or _median(c)


def _high(c: Candidate) -> float:
    return positive(c.hi_us) or _median(c)
