"""Time over m of one layer's candidates, both axes logarithmic, each median with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ...cache.rows import Candidate
from ..numbers import positive
from .heatmap import BackendNames

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 44, 34, 10, 34
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_APART = 12


@dataclass(frozen=True, slots=True)
class Tick:
    """A grid line: where it is, across or down, and the number beside it; every other number has a
    class that leaves it out where there is little room."""

    at: float
    label: str
    css: str = ""


@dataclass(frozen=True, slots=True)
class BackendLine:
    """A backend's line and the bars of its intervals, as paths of SVG."""

    css: str
    dash: str
    path: Markup
    bars: Markup


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing of WIDTH by HEIGHT: grid lines, lines, letters (x, y, letter) at their ends, and
    what they mean: letter, class, name."""

    ms: tuple[Tick, ...]
    times: tuple[Tick, ...]
    lines: tuple[BackendLine, ...]
    letters: tuple[tuple[float, float, str], ...]
    names: tuple[tuple[str, str, str], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True, slots=True)
class Scale:
    """Where an m and a time lie in the drawing."""

    first: float
    last: float
    fastest: float
    slowest: float

    def x(self, m: int) -> float:
        share = (math.log(m) - self.first) / (self.last - self.first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, us: float) -> float:
        share = (math.log(us) - self.fastest) / (self.slowest - self.fastest)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def chart(candidates: Sequence[Candidate], known: BackendNames) -> Chart | None:
    """A chart of those candidates that were timed; None where fewer than two m were.

    Each line has its backend's letter at its right end, a dash and a colour of its own.
    """
    timed = [c for c in candidates if positive(c.median_us) and c.bucket.m_hi > 0]
    ms = sorted({c.bucket.m_hi for c in timed})
    if len(ms) < 2:
        return None
    low, high = min(_low(c) for c in timed), max(_high(c) for c in timed)
    scale = Scale(math.log(ms[0]), math.log(ms[-1]), math.log(low) - 0.05, math.log(high) + 0.05)
    by_backend: dict[str, dict[int, Candidate]] = {}
    for candidate in timed:
        there = by_backend.setdefault(candidate.backend, {})
        best = there.get(candidate.bucket.m_hi)
        if best is None or _median(candidate) < _median(best):
            there[candidate.bucket.m_hi] = candidate
    drawn, ends, names = [], [], []
    for name in sorted(by_backend, key=lambda n: known.order.index(n) if n in known.order else 99):
        row = [by_backend[name][m] for m in sorted(by_backend[name])]
        drawn.append(_backend_line(row, known, scale))
        names.append((known.letter(name), known.swatch(name), name))
        ends.append((scale.y(_median(row[-1])), scale.x(row[-1].bucket.m_hi), known.letter(name)))
    return Chart(
        _m_ticks(ms, scale), _times(low, high, scale), tuple(drawn), _letters(ends), tuple(names)
    )


def _backend_line(row: Sequence[Candidate], known: BackendNames, scale: Scale) -> BackendLine:
    """One backend's candidates, by m."""
    name = row[0].backend
    at = known.order.index(name) if name in known.order else 0
    aside = 2.5 * (at % 5 - 2)  # so that intervals do not hide each other
    path = "".join(
        f"{'L' if i else 'M'}{scale.x(c.bucket.m_hi):.1f} {scale.y(_median(c)):.1f}"
        for i, c in enumerate(row)
    )
    bars = "".join(
        f"M{scale.x(c.bucket.m_hi) + aside:.1f} {scale.y(_low(c)):.1f}V{scale.y(_high(c)):.1f}"
        for c in row
        if positive(c.lo_us)
    )
    dash = _DASHES[at % len(_DASHES)]
    return BackendLine(f"l{known.at(name)}", dash, Markup(path), Markup(bars))


def _m_ticks(ms: Sequence[int], scale: Scale) -> tuple[Tick, ...]:
    """Those m that have room for their number."""
    out: list[Tick] = []
    for m in ms:
        if not out or scale.x(m) - out[-1].at >= 34:
            out.append(Tick(scale.x(m), str(m), " less" if len(out) % 2 else ""))
    return tuple(out)


def _times(low: float, high: float, scale: Scale) -> tuple[Tick, ...]:
    out = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            us = digit * 10.0**power
            if low <= us <= high:
                label = (
                    f"{us:g}" if us < 1e4 else f"{us / 1000:g}k" if us < 1e6 else f"{us / 1e6:g}M"
                )
                out.append(Tick(scale.y(us), label))
    return tuple(out)


def _letters(ends: Iterable[tuple[float, float, str]]) -> tuple[tuple[float, float, str], ...]:
    """Letters at the right ends of the lines, moved apart where they would lie on each other."""
    placed = []
    above = -99.0
    for at, x, letter in sorted(ends):
        above = max(at + 4, above + _APART)
        placed.append((x + 6, above, letter))
    return tuple(placed)


def _median(c: Candidate) -> float:
    return positive(c.median_us) or 1.0


def _low(c: Candidate) -> float:
    return positive(c.lo_us) or _median(c)


def _high(c: Candidate) -> float:
    return positive(c.hi_us) or _median(c)
