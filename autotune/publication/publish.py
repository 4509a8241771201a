"""Choosing over everything that holds, and publishing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...cache import codec, state
from ...cache import publish as publishing
from ...cache.errors import Corrupt, Missing
from ...cache.experts import META
from ...cache.ledger import Ledger
from ...cache.rows import VERDICTS, Audit, Candidate, Choice, Environment
from ...engines import names
from ..choice import layouts
from ..choice.rank import choices
from ..choice.single import experts_layers
from ..choice.traffic import Traffic
from ..plan import Report
from ..verdict.profiles import PROFILES
from . import published
from .condemn import condemned

_WORST_LAST = ("safe", "inconclusive", "unsafe", "unsupported")
assert set(_WORST_LAST) == set(VERDICTS)


def publish(
    reports: Sequence[Report], state_dir: Path, traffic: Mapping[str, Traffic] | None = None
) -> None:
    """Publish what these probes found, with what stands beside it; fills in each report's choices.

    `traffic` is by profile; one that is not given stays what it was. A report without a candidate
    changes nothing, and no generation is made of what stands already. Raises StateError; Corrupt
    where a run that this rests on is not as it was stored.
    """
    if not any(report.candidates for report in reports):
        return
    _refuse_damaged(reports, state_dir)
    # Held from reading what stands to replacing it: two probes may end at the same time.
    with state.exclusive(state.lock_file(state_dir, "join"), "the publication", wait=60):
        new = on_every_gpu([c for report in reports for c in report.candidates])
        environments = [e for report in reports for e in report.environments]
        stands = published.usable(state_dir)
        everyone, known = published.join(stands, new, environments)
        audits = [audit for report in reports for audit in report.audits]
        chosen, placed = _ranked(condemned(everyone, known, audits), stands.choices)
        unsupported = {name: why for report in reports for name, why in report.unsupported.items()}
        meta: dict[str, Any] = {
            "runs": [report.run for report in reports],
            "seed": reports[0].seed,
            "unsupported": unsupported,
        }
        before = stands.meta.get("devices")
        uuids = {r.target.uuid for r in reports} | set(before if isinstance(before, list) else ())
        if devices := sorted(uuid for uuid in uuids if isinstance(uuid, str)):
            meta["devices"] = devices  # by which a reader knows this host from another
        traffics = {**layouts.traffics_of(stands.meta), **(traffic or {})}
        if traffics:
            meta["traffic"] = {profile: each.json() for profile, each in traffics.items()}
        timed = quantiser_times(reports, layouts.quantisers_of(stands.meta))
        if timed:
            meta["quantisers"] = timed
        compared = layouts.compare_all(placed, traffics, stands.layers, timed)
        rows = [each.row() for each in compared if each.layout]
        meta |= _experts_meta(placed, traffics)
        now = published.Publication(
            stands.generation, meta, tuple(chosen), tuple(placed), tuple(known), tuple(rows)
        )
        generation = stands.generation
        if not generation or _publication_text(now) != _publication_text(stands):
            generation = publishing.publish(state_dir, chosen, placed, known, meta, rows)
    for report in reports:
        probed = {(c.scope, c.bucket) for c in report.candidates}
        report.generation = generation
        report.choices = [c for c in chosen if (c.scope, c.bucket) in probed]
        report.candidates = [c for c in placed if (c.scope, c.bucket) in probed]
        mine = {layouts.key_of(c) for c in report.candidates}
        report.layers = [each for each in compared if each.key in mine]


def _refuse_damaged(reports: Sequence[Report], state_dir: Path) -> None:
    """Raise Corrupt where a run that these reports rest on is damaged."""
    try:
        with Ledger.open(state_dir, readonly=True) as ledger:
            for run in dict.fromkeys(run for report in reports for run in report.runs):
                if why := ledger.damaged(run):
                    again = "nothing is published of it; probe again"
                    raise Corrupt(ledger.path, f"run {run} is damaged, {why}: {again}")
    except Missing:
        pass  # of candidates that came from elsewhere


def _publication_text(stands: published.Publication) -> list[object]:
    """What a publication says, whoever made it and when, in one order."""
    by = (*publishing.RESERVED, "runs", "seed")
    tables = (stands.choices, stands.candidates, stands.environments, stands.layers)
    return [
        {key: value for key, value in stands.meta.items() if key not in by},
        {e.fingerprint: frozenset(e.stamps) for e in stands.environments},
        *(sorted(codec.canonical(_compared_columns(row)) for row in table) for table in tables),
    ]


def _compared_columns(row: object) -> dict[str, Any]:
    return {k: v for k, v in codec.columns(row).items() if k != "first_seen"}


def publish_audits(audits: Sequence[Audit], state_dir: Path) -> int | None:
    """Turn standing choices away from what these audits flag; the new generation, if any.

    Raises StateError.
    """
    with state.exclusive(state.lock_file(state_dir, "join"), "the publication", wait=60):
        stands = published.usable(state_dir)
        candidates = condemned(stands.candidates, stands.environments, audits)
        if candidates == list(stands.candidates):
            return None
        return republish(state_dir, stands, candidates, stands.environments)


def quantiser_times(
    reports: Sequence[Report], before: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Times of activation quantisers: those of `reports`, and those from `before` that were not
    measured again and whose quantiser was not found wrong since."""
    new: dict[tuple[Any, ...], dict[str, Any]] = {}
    wrong = set()
    for report in reports:
        scope = report.target.device.arch, report.target.name
        for finding in report.findings:
            b = finding.bucket
            if b.n == 0:
                wrong.add((*scope, b.format, b.out_dtype, b.k, finding.backend))
        for row in report.timings:
            b = row.bucket
            if b.n == 0:
                place = (*scope, b.format, b.out_dtype, b.k, b.m_hi, row.backend)
                # Of several GPUs of a model, the slowest.
                us = max(row.median_us, new[place]["us"] if place in new else 0.0)
                new[place] = {**dict(zip(_TIMED, place, strict=True)), "us": us}
    kept = [dict(row) for row in before if tuple(row[name] for name in _TIMED) not in new]
    every = [*kept, *new.values()]
    return [r for r in every if tuple(r[n] for n in _TIMED if n != "m_hi") not in wrong]


_TIMED = ("arch", "gpu", "format", "out_dtype", "k", "m_hi", "backend")


def republish(
    state_dir: Path,
    stands: published.Publication,
    candidates: Sequence[Candidate],
    environments: Sequence[Environment],
) -> int:
    """Choose anew among `candidates`, with what `stands` says of itself; the new generation.

    For those who hold ``join.lock``. Raises StateError.
    """
    chosen, placed = _ranked(candidates, stands.choices)
    kept = {k: v for k, v in stands.meta.items() if k not in (*publishing.RESERVED, META)}
    kept |= _experts_meta(placed, layouts.traffics_of(kept))
    compared = layouts.compare_all(
        placed, layouts.traffics_of(kept), stands.layers, layouts.quantisers_of(kept)
    )
    rows = [each.row() for each in compared if each.layout]
    return publishing.publish(state_dir, chosen, placed, environments, kept, rows)


def _experts_meta(
    candidates: Sequence[Candidate], traffics: Mapping[str, Traffic]
) -> dict[str, Any]:
    """What is published of routed experts as a whole; nothing where there are none."""
    found = experts_layers(candidates, traffics)
    return {META: [each.json() for each in found]} if found else {}


def _ranked(
    candidates: Sequence[Candidate], stood: Sequence[Choice]
) -> tuple[list[Choice], list[Candidate]]:
    """The choices among candidates of any scope, and the candidates with their ranks."""
    chosen: list[Choice] = []
    placed: list[Candidate] = []
    for scope, group in published.by_scope(candidates).items():
        arch, _, name = scope
        profile = PROFILES.get(name, PROFILES["strict"])
        mine = [c for c in stood if c.scope == scope]
        sm = _sm(arch)
        by_default: dict[str | None, list[Candidate]] = {}
        for candidate in group:
            by_default.setdefault(profile.default_of(sm, candidate.bucket), []).append(candidate)
        for default, some in by_default.items():
            new = choices(some, default, mine, partial(unnamed, name, sm))
            chosen += new[0]
            placed += new[1]
    return chosen, placed


def unnamed(profile: str, sm: int | None, candidate: Candidate) -> bool:
    """Whether `profile` is an engine's and that engine has no name for the candidate's backend: it
    could never be told to run it. Any backend will do for a profile that is no engine's."""
    if profile not in names.ENGINES:
        return False
    return names.named(profile, candidate.backend, candidate.bucket.format, sm) is None


def on_every_gpu(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One candidate where several GPUs of a model were probed: safe only if safe on each.

    The worst verdict counts, with the slowest time and the fewest launches behind it.
    """
    merged: dict[tuple[object, ...], Candidate] = {}
    for c in candidates:
        place = c.place
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
        bounds=_looser(a.bounds, b.bounds),
        conditions=tuple({c["id"]: c for c in (*a.conditions, *b.conditions)}.values()),
        reasons=tuple(reasons),
    )


def _looser(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The weaker bound of each regime that both have: what holds on either GPU."""
    return {name: max(a[name], b[name], key=lambda x: x["upper"]) for name in a if name in b}


def _sm(arch: str) -> int | None:
    """``sm90`` to 90; None for a CPU."""
    return int(arch[2:]) if arch.startswith("sm") else None
