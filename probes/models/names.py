"""Names of many modules as one pattern."""

from __future__ import annotations

from collections.abc import Sequence


def starred(name: str) -> str:
    """A module's name with ``*`` for the numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def pattern_of(names: Sequence[str], totals: dict[str, int]) -> str:
    """One pattern for the modules of a row: ``*`` for the number of a layer where all that are
    called so are in it, else ``{0-2,5}``; leaves of one parent in braces."""
    by_star: dict[str, list[str]] = {}
    for name in names:
        by_star.setdefault(starred(name), []).append(name)
    parents: dict[str, list[str]] = {}
    for star, own in by_star.items():
        shown = star if len(own) == totals[star] else _with_numbers(star, own)
        parent, _, leaf = shown.rpartition(".")
        parents.setdefault(parent, []).append(leaf)
    shown_ = []
    for parent, leaves in parents.items():
        leaf = leaves[0] if len(leaves) == 1 else "{" + ",".join(leaves) + "}"
        shown_.append(f"{parent}.{leaf}" if parent else leaf)
    return " ".join(shown_)


def _with_numbers(star: str, names: Sequence[str]) -> str:
    """`star` with the numbers that its first ``*`` stands for."""
    at = star.split(".").index("*") if "*" in star.split(".") else -1
    if at < 0:
        return star
    numbers = sorted({int(p) for p in (name.split(".")[at] for name in names) if p.isdigit()})
    if not numbers:
        return star
    parts = star.split(".")
    parts[at] = "{" + ",".join(_as_runs(numbers)) + "}"
    return ".".join(parts)


def _as_runs(numbers: Sequence[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
