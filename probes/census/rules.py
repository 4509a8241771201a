"""What a census shows to be wrong. Pure.

*PDL without wait.* A kernel that was launched with programmatic stream serialization, whose code
has no ``griddepcontrol.wait`` on any path, and which accesses global memory, reads or writes what
the kernel before it may still be using: no race has to be seen. A kernel that touches no global
memory cannot. An access *before* a wait that is there is not a finding, since weights may rightly
be read early; the adversarial regimes decide that.

*Silent fallback.* A tactic's name claims that code of its own runs. The claim is broken where

1. the backend says by `kernel_of` what a tactic's kernel is called, and no kernel that ran is;
2. two tactics launched the same code with the same geometry for every m of a bucket, and either
   elsewhere they do not (so each has code of its own, and here one took the other's), or all
   arguments were the same to the last byte;
3. code was timed that never ran, for that tactic and bucket, in the form in which it was checked.

Of the two in 2 it is the one whose kernels here are less like its own elsewhere, else the one named
later. ``default`` and ``auto`` name no code and are never accused, nor is anybody for them. Equal
code without such proof is told as ``same_as``: a variant may well differ in an argument alone.
Where a CUDA graph was launched or only names were seen, 2 and 3 claim nothing that rests on
what was not seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..audit import sass
from .kernels import CUPTI, Census, Kernel, Wait, demangled, names

PDL_WITHOUT_WAIT = "pdl without wait"
SILENT_FALLBACK = "silent fallback"
ANY_CODE = ("default", "auto")
"""Tactics that leave the choice of code to the backend."""

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ran:
    """What one tactic ran at one m of a bucket."""

    tactic: str
    bucket: int
    m: int
    census: Census


def findings(census: Census, judge: Callable[[Kernel], Wait] | None = None) -> list[Found]:
    """Every PDL launch in `census` that never waits, once a kernel.

    judge: how a kernel waits; default what the census itself recorded.
    """
    found: dict[tuple[str, str | None], Found] = {}
    for kernel in census.kernels:
        if not kernel.pdl or kernel.code in found:
            continue
        wait = judge(kernel) if judge else kernel.wait
        if wait.status == sass.NO_WAIT and wait.access:
            found[kernel.code] = {
                "kind": PDL_WITHOUT_WAIT,
                "kernel": demangled(kernel.name)[:300],
                "digest": kernel.digest,
                "first_access": wait.access,
                "message": (
                    f"{demangled(kernel.name)[:120]} is launched with programmatic stream"
                    f" serialization and never waits; it accesses global memory: {wait.access}"
                ),
            }
    return list(found.values())


def claimed(pattern: str | None, ran: Iterable[Ran]) -> list[Found]:
    """Rule 1: each m at which no kernel is called what `kernel_of` says.

    pattern: a regular expression, searched in mangled and readable names. Raises ValueError for
    one that is none.
    """
    if pattern is None:
        return []
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"kernel_of gives no regular expression: {error}") from None
    missed = [
        each
        for each in ran
        if each.census.kernels
        and not each.census.graphs
        and not any(
            wanted.search(k.name) or wanted.search(demangled(k.name)) for k in each.census.kernels
        )
    ]
    if not missed:
        return []
    first = missed[0]
    message = (
        f"no kernel like {pattern!r} ran at m={first.m}, but {_first_names(first.census.kernels)}"
    )
    return [_fallback(first.m, message, ms=[each.m for each in missed])]


def alike(ran: Sequence[Ran], kept: Iterable[str] = ()) -> tuple[dict, dict]:
    """Rule 2, over all tactics of one backend in one layer.

    kept: tactics whose `kernel_of` was found to hold: they are not accused. Returns two maps from
    (tactic, bucket): to the tactics with the same kernels, and to findings.
    """
    by_place: dict[int, dict[str, dict[int, Census]]] = {}
    for each in ran:
        if each.census.source == CUPTI and each.census.kernels and not each.census.graphs:
            place = by_place.setdefault(each.bucket, {})
            place.setdefault(each.tactic, {})[each.m] = each.census
    same: dict[tuple[str, int], list[str]] = {}
    accused: dict[tuple[str, int], list[Found]] = {}
    for bucket, tactics in by_place.items():
        order = list(tactics)
        for later, second in enumerate(order):
            for first in order[:later]:
                one, two = tactics[first], tactics[second]
                if set(one) != set(two) or not all(_same_launches(one[m], two[m]) for m in one):
                    continue
                same.setdefault((second, bucket), []).append(first)
                same.setdefault((first, bucket), []).append(second)
                if {first, second} & set(ANY_CODE):
                    continue
                if all(_identical(one[m], two[m]) for m in one):
                    proof = "with the same arguments to the last byte"
                elif _differ_elsewhere(by_place, bucket, first, second):
                    proof = "though the two run different code at other m"
                else:
                    continue
                guilty = _guilty(by_place, bucket, first, second, set(kept))
                if guilty is None:
                    continue
                other = first if guilty == second else second
                m = max(one)
                message = (
                    f"tactic {guilty} launched exactly what {other} did at m={m},"
                    f" {_first_names(one[m].kernels)}, {proof}"
                )
                accused.setdefault((guilty, bucket), []).append(
                    _fallback(m, message, other=other, ms=sorted(one))
                )
    return same, accused


def timed(checked: Iterable[Census], timing: Census) -> list[Found]:
    """Rule 3, for one tactic in one bucket. Where a digest is unknown names are compared."""
    seen = list(checked)
    if not seen or any(c.graphs or c.source != timing.source for c in (*seen, timing)):
        return []
    known = [kernel for census in seen for kernel in census.kernels]
    if not known or not timing.kernels:
        return []
    exact = {kernel.code for kernel in known}
    by_name: dict[str, set[str | None]] = {}
    for kernel in known:
        by_name.setdefault(kernel.name, set()).add(kernel.digest)
    strange = [
        kernel
        for kernel in timing.kernels
        if kernel.code not in exact
        and not (kernel.name in by_name and (not kernel.digest or None in by_name[kernel.name]))
    ]
    if not strange:
        return []
    message = f"timed, but never run when it was checked: {_first_names(strange)}"
    return [{**_fallback(None, message), "checked": names(known)[:8]}]


def _same_launches(one: Census, two: Census) -> bool:
    """The same code, known, with the same geometry, in the same order."""
    return all(k.digest for k in one.kernels) and [(k.code, k.geometry) for k in one.kernels] == [
        (k.code, k.geometry) for k in two.kernels
    ]


def _identical(one: Census, two: Census) -> bool:
    arguments = [k.arguments for k in one.kernels]
    return None not in arguments and arguments == [k.arguments for k in two.kernels]


def _code_of_kernels(census: Census) -> set[tuple[str, str | None]]:
    return {kernel.code for kernel in census.kernels}


def _differ_elsewhere(
    by_place: Mapping[int, Mapping[str, Mapping[int, Census]]], bucket: int, a: str, b: str
) -> bool:
    for place, tactics in by_place.items():
        if place != bucket and a in tactics and b in tactics:
            both = set(tactics[a]) & set(tactics[b])
            if any(
                _code_of_kernels(tactics[a][m]) != _code_of_kernels(tactics[b][m]) for m in both
            ):
                return True
    return False


def _guilty(
    by_place: Mapping[int, Mapping[str, Mapping[int, Census]]],
    bucket: int,
    first: str,
    second: str,
    kept: set[str],
) -> str | None:
    """Who took the other's code; None where both kept what they claim."""
    if first in kept or second in kept:
        return None if {first, second} <= kept else (second if first in kept else first)

    def own(tactic: str) -> float:
        """How much of what it ran here it runs elsewhere, too; 1 where it runs nowhere else."""
        here = set().union(*(_code_of_kernels(c) for c in by_place[bucket][tactic].values()))
        elsewhere = [
            _code_of_kernels(census)
            for place, tactics in by_place.items()
            if place != bucket
            for census in tactics.get(tactic, {}).values()
        ]
        if not elsewhere:
            return 1.0
        return sum(len(here & there) / len(here | there) for there in elsewhere) / len(elsewhere)

    return first if own(first) < own(second) else second


def _fallback(m: int | None, message: str, **more: Any) -> Found:
    found: Found = {"kind": SILENT_FALLBACK, "message": message, **more}
    if m is not None:
        found["m"] = m
    return found


def _first_names(kernels: Sequence[Kernel]) -> str:
    found = names(kernels)
    return ", ".join(name[:80] for name in found[:3]) + (" ..." if len(found) > 3 else "")
