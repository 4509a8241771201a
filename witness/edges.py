"""Programmatic edges that a captured graph has lost to the witness: which, by the kernels' names.

An edge from a GEMM to the kernel behind it is gone where the witness stands between the two; the
one from the kernel before to the GEMM never is. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

Edge = tuple[str, str, bool]
"""From a kernel to a kernel, by name; whether it is programmatic."""


def lost(bare: Iterable[Edge], watched: Iterable[Edge]) -> list[tuple[str, str, int]]:
    """Programmatic edges of a graph without the witness that the same graph with it has not:
    (from, to, how many), in order of names."""
    before, after = _programmatic(bare), _programmatic(watched)
    return sorted((source, target, n) for (source, target), n in (before - after).items())


def touched(bare: Iterable[Edge], watched: Iterable[Edge], gemms: Iterable[str]) -> list[str]:
    """Kernels of `gemms` whose edge from the kernel before them is gone: there should be none."""
    known = set(gemms)
    return sorted({target for _, target, _ in lost(bare, watched) if target in known})


def _programmatic(edges: Iterable[Edge]) -> Counter[tuple[str, str]]:
    return Counter((source, target) for source, target, programmatic in edges if programmatic)
