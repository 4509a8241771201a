"""Programmatic edges that a captured graph has lost to the witness: which, by the kernels' names.

An edge from a GEMM to the kernel behind it is gone where the witness stands between the two; the
one from the kernel before to the GEMM never is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..probes.regimes.pdl import edges

NamedEdge = tuple[str, str, bool]
"""From a kernel to a kernel, by name; whether it is programmatic."""


def captured(stream: int) -> list[NamedEdge]:
    """The edges of the graph that `stream` (a CUDA handle) is captured into, as they are now.
    Raises `EdgesHidden` where the driver does not tell."""
    return [
        (edges.name(each.source), edges.name(each.target), each.programmatic)
        for each in edges.captured_edges(stream)
    ]


def lost(bare: Iterable[NamedEdge], watched: Iterable[NamedEdge]) -> list[tuple[str, str, int]]:
    """Programmatic edges of a graph without the witness that the same graph with it has not:
    (from, to, how many), in order of names."""
    before, after = _programmatic(bare), _programmatic(watched)
    return sorted((source, target, n) for (source, target), n in (before - after).items())


def touched(
    bare: Iterable[NamedEdge], watched: Iterable[NamedEdge], gemms: Iterable[str]
) -> list[str]:
    """Kernels of `gemms` whose edge from the kernel before them is gone: there should be none."""
    known = set(gemms)
    return sorted({target for _, target, _ in lost(bare, watched) if target in known})


def _programmatic(edges: Iterable[NamedEdge]) -> Counter[tuple[str, str]]:
    return Counter((source, target) for source, target, programmatic in edges if programmatic)
