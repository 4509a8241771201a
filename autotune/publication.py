"""Choosing over everything that holds, and publishing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..cache import publish as publishing
from ..cache import state
from ..cache.rows import VERDICTS, Candidate, Choice
from . import standing
from .choose import choices
from .probe import Report
from .profiles import PROFILES

_WORST_LAST = ("safe", "inconclusive", "unsafe", "unsupported")
assert set(_WORST_LAST) == set(VERDICTS)


def publish(reports: Sequence[Report], state_dir: Path) -> None:
    """Publish what these probes found, with what stands beside it; fills in each report's choices.

    A report without a candidate changes nothing. Raises StateError.
    """
    if not any(report.candidates for report in reports):
        return
    # Held from reading what stands to replacing it: two probes may end at the same time.
    with state.exclusive(state_dir / "join.lock", "the publication", wait=60):
        new = on_every_gpu([c for report in reports for c in report.candidates])
        environments = [e for report in reports for e in report.environments]
        everyone, known = standing.join(standing.usable(state_dir), new, environments)
        chosen: list[Choice] = []
        placed: list[Candidate] = []
        for (arch, _, name), group in standing.by_scope(everyone).items():
            profile = PROFILES.get(name, PROFILES["strict"])
            new_choices, new_placed = choices(group, profile.default(_sm(arch)))
            chosen += new_choices
            placed += new_placed
        unsupported = {name: why for report in reports for name, why in report.unsupported.items()}
        meta = {
            "runs": [report.run for report in reports],
            "seed": reports[0].seed,
            "unsupported": unsupported,
        }
        generation = publishing.publish(state_dir, chosen, placed, known, meta)
    for report in reports:
        probed = {(c.arch, c.gpu, c.profile, c.bucket) for c in report.candidates}
        report.generation = generation
        report.choices = [c for c in chosen if (c.arch, c.gpu, c.profile, c.bucket) in probed]
        report.candidates = [c for c in placed if (c.arch, c.gpu, c.profile, c.bucket) in probed]


def on_every_gpu(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One candidate where several GPUs of a model were probed: safe only if safe on each.

    The worst verdict counts, with the slowest time and the fewest launches behind it.
    """
    merged: dict[tuple[object, ...], Candidate] = {}
    for c in candidates:
        place = (c.arch, c.gpu, c.profile, c.bucket, c.backend)
        other = merged.get(place)
        merged[place] = c if other is None else _worse(other, c)
    return list(merged.values())


def _worse(a: Candidate, b: Candidate) -> Candidate:
    worst, best = sorted((a, b), key=lambda c: _WORST_LAST.index(c.verdict), reverse=True)
    timed = [c for c in (a, b) if c.median_us is not None]
    slowest = max(timed, key=lambda c: c.median_us or 0.0) if len(timed) == 2 else worst
    reasons = dict.fromkeys((*worst.reasons, *best.reasons))
    if a.tactic != b.tactic:
        # Each GPU proved its own favourite only; the node's choice must have been run on both.
        reasons["the GPUs of this node favour different tactics"] = None
        worst = replace(worst, verdict=max(worst.verdict, "inconclusive", key=_WORST_LAST.index))
    return replace(
        worst,
        median_us=slowest.median_us,
        lo_us=slowest.lo_us,
        hi_us=slowest.hi_us,
        launches=min(a.launches, b.launches),
        problems=min(a.problems, b.problems),
        conditions=tuple({c["id"]: c for c in (*a.conditions, *b.conditions)}.values()),
        reasons=tuple(reasons),
    )


def _sm(arch: str) -> int | None:
    """``sm90`` to 90; None for a CPU."""
    return int(arch[2:]) if arch.startswith("sm") else None
