"""The census of a layer: every tactic at every m in the forms it is checked in, and as timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..census import rules
from ..census.attach import census
from ..census.kernels import NONE, PROFILER, UNKNOWN, Census, Kernel, plain_kernel
from ..data import WIDTHS
from ..launch.case import BackendRaised, bind, blame, prepared_activation
from ..launch.item import Item
from ..launch.outcome import capture
from ..launch.timing import Timed
from .session import OpenLayer

_MOST_KERNELS = 24
"""Kernels of one tactic and bucket that evidence names in full."""
_WORST = ("no-wait", UNKNOWN, "access-before-wait", "wait-present")

Result = dict[str, Any]
Seen = dict[tuple[str, int], tuple[Census, ...]]
"""By tactic and m: everything that was seen of it in a form in which it is checked."""


def checked(layer: OpenLayer, items: Sequence[Item]) -> tuple[list[Result], Seen]:
    """Take the census of graded items: what each launches, and what is wrong with that.

    Each m is launched eagerly on a window as in grading, eagerly into a fresh output as in timing
    (always the same memory, so that two tactics' arguments can be compared), and the largest in a
    CUDA graph's capture, too. Nothing is compared with a right answer.
    """
    ran: list[rules.Ran] = []
    seen: Seen = {}
    notes: list[list[str]] = [[] for _ in items]
    most = max((m for item in items for m in item.ms), default=0)
    out = torch.empty(most * layer.problem.n, dtype=layer.problem.dtype, device=layer.device.torch)
    for index, item in enumerate(items):
        layer.progress(f"census: {item.tactic} at m={', '.join(map(str, item.ms))}")
        for m in item.ms:
            try:
                found = _forms(layer, item, m, out, notes[index])
            except (RuntimeError, BackendRaised) as error:
                # Grading, or the regime that launches so, has it as a finding of its own.
                notes[index].append(f"m={m}: {str(error).splitlines()[0][:200]}")
                continue
            ran.append(rules.Ran(item.tactic, _bucket_number(item), m, found[0]))
            seen[item.tactic, m] = found
    patterns = {item.tactic: _pattern(layer, item.tactic) for item in items}
    bad: list[list[Result]] = []
    kept: set[str] = set()
    for tactic, pattern in patterns.items():
        mine = [each for each in ran if each.tactic == tactic]
        if pattern and mine and not rules.claimed(pattern, mine):
            kept.add(tactic)
    same, accused = rules.alike(ran, kept)
    for item in items:
        place = item.tactic, _bucket_number(item)
        mine = [each for each in ran if (each.tactic, each.bucket) == place]
        forms = [c for m in item.ms for c in seen.get((item.tactic, m), ())]
        everything = Census(tuple(k for c in forms for k in c.kernels), NONE)
        bad.append(
            rules.findings(everything)
            + rules.claimed(patterns[item.tactic], mine)
            + accused.get(place, [])
        )
    results = [
        {
            "bad": bad[index],
            **_described(
                [seen[item.tactic, m] for m in item.ms if (item.tactic, m) in seen],
                same.get((item.tactic, _bucket_number(item)), []),
                notes[index],
            ),
        }
        for index, item in enumerate(items)
    ]
    return results, seen


def timed(layer: OpenLayer, seen: Seen) -> list[list[Result]]:
    """What is wrong with each timed item: code that never ran when the tactic was checked."""
    # The largest m of each: that was captured when it was checked.
    return [_timed(layer, each.parts[-1], seen) for each in layer.timed]


def _timed(layer: OpenLayer, part: Timed, seen: Seen) -> list[Result]:
    forms = seen.get((part.tactic, part.m))
    if not forms:
        return []
    layer.progress(f"census: {part.tactic} as timed at m={part.m}")
    try:
        timing = census(lambda: _captured(part.eager))
    except (RuntimeError, BackendRaised):
        return []
    bad = rules.timed(forms, timing)
    return [{**finding, "m": part.m} for finding in bad] + rules.findings(timing)


def _bucket_number(item: Item) -> int:
    """Items of one bucket have the same m's, of different buckets none in common."""
    return max(item.ms)


def _pattern(layer: OpenLayer, tactic: str) -> str | None:
    kernel_of = getattr(layer.backend, "kernel_of", None)
    if kernel_of is None:
        return None
    with blame(layer.backend):
        return kernel_of(tactic)


def _forms(
    layer: OpenLayer, item: Item, m: int, memory: torch.Tensor, notes: list[str]
) -> tuple[Census, ...]:
    """The same launch as in timing first, then as in grading, then captured.

    memory: where the first of them writes, at least m * n elements.
    """
    backend, problem = layer.backend, layer.problem
    case = layer.cases(WIDTHS[0])[0]
    activation = prepared_activation(backend, case.rows(0, m))
    out = memory[: m * problem.n].view(m, problem.n)

    def run() -> None:
        with blame(backend):
            backend.run(case.state, activation, out, item.tactic)

    cases = layer.cases(item.width)
    (launch,) = layer.launches([replace(item, ms=(m,))], cases, ("census", m))
    # The other first: after it, arguments of this one can be told.
    graded = census(bind(backend, cases, launch).enqueue)
    found = [census(run), graded]
    if m and m == max(item.ms) and layer.device.kind == "cuda":
        try:
            found.append(census(lambda: _captured(run)))
        except (RuntimeError, BackendRaised) as error:
            notes.append(f"m={m}, captured: {str(error).splitlines()[0][:200]}")
    return tuple(found)


def _captured(run: Callable[[], None]) -> None:
    """Run once eagerly and once into a graph that is thrown away."""
    graph = capture(run)
    torch.cuda.synchronize()
    del graph


def _described(
    forms: Sequence[tuple[Census, ...]], same_as: Sequence[str], notes: Sequence[str]
) -> Result:
    """What the ledger keeps of one tactic in one bucket."""
    every = [census for those in forms for census in those]
    kernels = [kernel for those in forms for kernel in those[0].kernels]
    sources = {census.source for census in every if census.kernels}
    source = sources.pop() if len(sources) == 1 else ("mixed" if sources else NONE)
    unique: dict[tuple[Any, ...], list[Kernel]] = {}
    for kernel in kernels:
        unique.setdefault((kernel.code, kernel.geometry), []).append(kernel)
    pdl = [kernel for census in every for kernel in census.kernels if kernel.pdl]
    detail: Result = {
        "source": source,
        "kernels": [
            plain_kernel(each[0], len(each)) for each in list(unique.values())[:_MOST_KERNELS]
        ],
        "pdl": None if source in (PROFILER, NONE) else bool(pdl),
    }
    digest = Census(tuple(kernels), source).digest
    if digest:
        detail["code"] = digest
    if len(unique) > _MOST_KERNELS:
        detail["more_kernels"] = len(unique) - _MOST_KERNELS
    if pdl:
        detail["wait"] = min((k.wait.status for k in pdl), key=_WORST.index)
    if same_as:
        detail["same_as"] = sorted(set(same_as))
    said = [*notes, *(note for census in every for note in census.notes)]
    if said:
        detail["notes"] = list(dict.fromkeys(said))[:8]
    return {"seen": bool(kernels), "detail": detail}
