"""What is known of the failure rates of the kernels chosen, regime by regime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...cache.rows import Choice
from ..wording import range_text
from .heatmap import DASH, BackendNames, HeatCell

_MISFITS = (KeyError, TypeError, ValueError, OverflowError)
"""What a bound that is stored in another way raises when it is read."""


@dataclass(frozen=True, slots=True)
class KernelBounds:
    """A compiled kernel by its backend's letter and tactic, the buckets that have it, and its bound
    in each regime."""

    letter: str
    tactic: str
    where: str
    cells: tuple[HeatCell, ...]


@dataclass(frozen=True, slots=True)
class ScopeBounds:
    """Of one scope: for each regime the loosest and the tightest bound of each backend, and the
    bounds of every kernel. `confidence` is empty where they do not say one and the same."""

    title: str
    confidence: str
    backends: tuple[str, ...]
    regimes: tuple[str, ...]
    spans: tuple[tuple[str, tuple[HeatCell, ...]], ...]
    kernels: tuple[KernelBounds, ...]


def scope_bounds(title: str, choices: Sequence[Choice], known: BackendNames) -> ScopeBounds | None:
    """None where no choice has bounds."""
    kernels: dict[tuple[str, ...], list[Choice]] = {}
    for choice in choices:
        if choice.bounds and choice.status != "none":
            place = (choice.backend, choice.tactic, str(sorted(choice.bounds.items())))
            kernels.setdefault(place, []).append(choice)
    if not kernels:
        return None
    firsts = [group[0] for group in kernels.values()]
    regimes = sorted({str(name) for c in firsts for name in c.bounds})
    backends = [name for name in known.order if any(c.backend == name for c in firsts)]
    spans = (
        (regime, tuple(_span(regime, [c for c in firsts if c.backend == n]) for n in backends))
        for regime in regimes
    )
    return ScopeBounds(
        title,
        _confidence(firsts),
        tuple(f"{known.letter(name)} {name}" for name in backends),
        tuple(regimes),
        tuple(spans),
        tuple(_kernel_bounds(group, regimes, known) for group in kernels.values()),
    )


def _confidence(group: Sequence[Choice]) -> str:
    said: set[float] = set()
    for choice in group:
        for bound in choice.bounds.values():
            try:
                said.add(float(bound["confidence"]))
            except _MISFITS:
                return ""
    return f" ({100 * said.pop():g} %)" if len(said) == 1 else ""


def _kernel_bounds(
    group: Sequence[Choice], regimes: Sequence[str], known: BackendNames
) -> KernelBounds:
    first = group[0]
    layers = sorted({(c.bucket.n, c.bucket.k) for c in group})
    m = range_text(min(c.bucket.m_lo for c in group), max(c.bucket.m_hi for c in group), DASH)
    where = ", ".join(f"n {n} k {k}" for n, k in layers[:3])
    where += f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    cells = tuple(_bound_cell(first.bounds.get(regime)) for regime in regimes)
    return KernelBounds(known.letter(first.backend), first.tactic, f"{where}, m {m}", cells)


def _span(regime: str, group: Sequence[Choice]) -> HeatCell:
    uppers = []
    for choice in group:
        try:
            uppers.append(float(choice.bounds[regime]["upper"]))
        except _MISFITS:
            continue
    if not uppers:
        return HeatCell(text="·")
    loose, tight = max(uppers), min(uppers)
    below = "" if loose == tight else f"to {tight:.2g}"
    return HeatCell(_shade(loose), text=f"{loose:.2g}", below=below)


def _bound_cell(known: object) -> HeatCell:
    if known is None:
        return HeatCell(text="·")
    try:
        upper = float(known["upper"])  # type: ignore[index]
        problems, failures = int(known["problems"]), int(known["failures"])  # type: ignore[index]
    except _MISFITS:
        return HeatCell("bad", text="not understood")
    css = "bad" if failures else _shade(upper)
    return HeatCell(css, text=f"{upper:.2g}", below=f"{failures} of {problems:,}")


def _shade(rate: float) -> str:
    """The class for an upper bound of a failure rate: the lower, the stronger."""
    limits = (0.3, 0.1, 0.03, 0.01, 0.001, 0.0001)
    return f"s{sum(rate <= limit for limit in limits)}"
