"""Why this backend: everything that is known of one problem's bucket, as a document.

Nothing is decided here: candidates, ranks and verdicts are the published ones, the answer is the
reader's, and findings come from the ledger where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..autotune import checkpoint_check
from ..autotune.choice import layouts
from ..autotune.choice.rank import FLOORS, time_of
from ..autotune.evidence.wording import shown, told
from ..autotune.publication import published
from ..cache import reader
from ..cache.decision import Decision
from ..cache.experts import layer_words, option_text
from ..cache.measured import NOISE, fastest_of
from ..cache.rows import Candidate, Finding
from ..errors import NOT_ASSESSED, SAFE, UNSAFE, Refused
from ..probes.problem import Problem
from . import documents
from .wording import reference_line, without_name


def explain(
    place: Path,
    problem: Problem,
    profile: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document. `record` is what `checkpoint_check.find` has of a checkpoint.

    Raises Refused where nothing was measured for the problem (or for several scopes, and none was
    named), and StateError.
    """
    p = problem
    reading = reader.open(place, profile=profile)
    decision = reading.choose(p.m, p.n, p.k, p.format, p.activation, p.out_dtype, p.groups)
    scope = reading.scope()
    if scope is None:
        raise Refused(decision.reason)
    stands = published.load(place)
    layer = [c for c in stands.candidates if layouts.key_of(c) == (*scope, *_shape(problem))]
    group = [c for c in layer if c.bucket.m_lo <= p.m <= c.bucket.m_hi]
    if not group:
        where = f"m={p.m}, {layer_words(asdict(p))} {p.format}"
        raise Refused(f"nothing was measured at {where}: {_nearest(layer, problem)}")
    group.sort(key=_best_first)
    findings = [f for f in documents.stored_findings(place)[0] if f.bucket == group[0].bucket]
    taken = (
        _candidate_of(group, decision.backend, decision.tactic)
        if decision.status == "safe"
        else None
    )
    candidates = [_explained_candidate(c, taken, findings, record) for c in group]
    comparison = documents.layer_of(stands, layer)
    arch, gpu, under = scope
    document = {
        "problem": asdict(problem),
        "arch": arch,
        "gpu": gpu,
        "profile": under,
        "generation": stands.generation,
        "bucket": {"m_lo": group[0].bucket.m_lo, "m_hi": group[0].bucket.m_hi},
        "choice": {
            "backend": decision.backend,
            "tactic": decision.tactic,
            "layout": decision.layout,
            "status": decision.status,
            "median_us": decision.median_us,
            "reason": decision.reason,
            "recorded_backend": decision.recorded_backend,
        },
        "why": _why(decision, taken, group),
        "candidates": candidates,
        "default": _default_compared(decision, taken, group, stands.meta, under),
        "price": _price(taken, group),
        "layer": comparison.json(),
    }
    if record is not None:
        wanted = taken.conditions if taken else ()
        document["checkpoint"] = checkpoint_check.assess(record, wanted, p.format, p.out_dtype)
    else:
        document["checkpoint"] = None
    return document


def exit_code(document: Mapping[str, Any]) -> int:
    """As of ``choose``: 0 safe, 1 nothing safe (or not for this checkpoint), 2 stale."""
    status, weights = document["choice"]["status"], document["checkpoint"]
    if status == "safe":
        return UNSAFE if weights and weights["status"] == "broken" else SAFE
    return NOT_ASSESSED if status == "stale" else UNSAFE


def _shape(problem: Problem) -> tuple[str, str, str, int, int, int]:
    p = problem
    return p.format, p.activation, p.out_dtype, p.groups, p.n, p.k


def _nearest(layer: Sequence[Candidate], problem: Problem) -> str:
    if not layer:
        experts = option_text(asdict(problem))
        one = f"--experts {experts}" if experts else f"--shape {problem.n},{problem.k}"
        return f"this layer was not probed; fp4tune probe {one} does, fp4tune show lists what was"
    return f"of this layer m up to {max(c.bucket.m_hi for c in layer)} was probed"


def _best_first(c: Candidate) -> tuple[bool, int, bool, float, str, str]:
    """Those that may be chosen by rank, then the others by their time."""
    ranked, timed = c.rank is None, c.median_us is None
    return ranked, c.rank or 0, timed, c.median_us or 0.0, c.backend, c.tactic


def _candidate_of(group: Sequence[Candidate], backend: str, tactic: str) -> Candidate | None:
    return next((c for c in group if (c.backend, c.tactic) == (backend, tactic)), None)


def _explained_candidate(
    c: Candidate,
    taken: Candidate | None,
    findings: Sequence[Finding],
    record: Mapping[str, Any] | None,
) -> dict[str, Any]:
    conditions: list[dict[str, Any]] = [dict(each) for each in c.conditions]
    if record is not None:
        assessed = checkpoint_check.assess(
            record, c.conditions, c.bucket.format, c.bucket.out_dtype
        )
        by_id = {each["id"]: each["status"] for each in assessed["conditions"]}
        conditions = [{**each, "status": by_id[each["id"]]} for each in conditions]
    mine = [f for f in findings if f.backend == c.backend]
    return {
        "backend": c.backend,
        "tactic": c.tactic,
        "layout": c.layout,
        "verdict": c.verdict,
        "rank": c.rank,
        "median_us": c.median_us,
        "lo_us": c.lo_us,
        "hi_us": c.hi_us,
        "times": _ratio(c, taken),
        "width": c.width,
        "launches": c.launches,
        "problems": c.problems,
        "conditions": conditions,
        "reasons": list(c.reasons),
        "bounds": dict(c.bounds),
        "findings": [
            {
                "id": f.id,
                "tactic": f.tactic,
                "kind": f.kind,
                "regime": f.regime,
                "data": f.data,
                "text": told(f),
            }
            for f in mine
        ],
        "text": _candidate_in_words(c, taken),
    }


def _ratio(c: Candidate, taken: Candidate | None) -> float | None:
    if taken is None or c.median_us is None or not taken.median_us:
        return None
    return c.median_us / taken.median_us


def _candidate_in_words(c: Candidate, taken: Candidate | None) -> str:
    tactic = "" if c.tactic == "default" else f" {c.tactic}"
    text = f"{c.backend}{tactic} ({c.layout}): {c.verdict}, {_time_with_interval(c)}"
    ratio = _ratio(c, taken)
    unnamed = without_name(c)
    if c is taken:
        text += ", the choice"
    elif ratio is not None:
        text += f", {ratio:.2f} times the choice"
    if unnamed and c is not taken:
        text += f"; {unnamed}"
    if c.verdict == "safe":
        text += f"; {shown(c.bounds, c.bucket.m_lo, c.bucket.m_hi)}"
    return text


def _time_with_interval(c: Candidate) -> str:
    if c.median_us is None:
        return "not timed"
    if c.lo_us is None or c.hi_us is None:
        return f"{c.median_us:.1f} us"
    return f"{c.median_us:.1f} us ({c.lo_us:.1f} to {c.hi_us:.1f})"


def _why(decision: Decision, taken: Candidate | None, group: Sequence[Candidate]) -> str:
    if decision.status != "safe":
        return f"No choice holds, so {decision.backend}: {decision.status}, {decision.reason}."
    name = decision.backend
    if decision.reason:
        return f"{name} is chosen, since {decision.reason}."
    ranked = [c for c in group if c.rank is not None]
    if len(ranked) == 1:
        return f"{name} is chosen: nothing else is safe here."
    if taken is None or taken.median_us is None:
        return f"{name} is chosen: an empty batch has no time, so the smallest bucket decides."
    times = {c.backend: t for c in ranked if (t := time_of(c)) is not None}
    fastest = fastest_of(times)
    if not times[taken.backend].level_with(fastest):
        return (
            f"{name} is chosen: it stood before, and nothing safe is enough faster to replace it."
        )
    equal = [name for name, t in times.items() if name != taken.backend and t.level_with(fastest)]
    if equal:
        usual = ", and it is the engine's default" if name == decision.default_backend else ""
        return (
            f"{name} is chosen: within {100 * NOISE:g} % of the fastest safe one or not told apart "
            f"from it, as {', '.join(equal)}, which counts as equal{usual}."
        )
    return f"{name} is chosen: the fastest that is safe."


def _default_compared(
    decision: Decision,
    taken: Candidate | None,
    group: Sequence[Candidate],
    meta: Mapping[str, Any],
    profile: str,
) -> dict[str, Any]:
    """What the engine would take by itself, and what the choice costs or saves against it."""
    name = decision.default_backend
    default = next((c for c in group if c.backend == name), None)
    saved = _saved(default, taken)
    out: dict[str, Any] = {
        "backend": name,
        "verdict": default.verdict if default else None,
        "median_us": default.median_us if default else None,
        "saves_us": saved,
    }
    if name is None:
        text = f"What an engine would take here by itself is not known under the profile {profile}."
    elif default is None:
        why = (meta.get("unsupported") or {}).get(name)
        text = f"The engine by itself would take {name}, which was not measured here"
        text += f": {why}." if why else "."
    elif taken is not None and default.backend == taken.backend:
        text = f"{name} is also what the engine would take by itself."
    else:
        time = _time_with_interval(default)
        text = f"The engine by itself would take {name}: {default.verdict}, {time}"
        text += f" ({'; '.join(default.reasons)})." if default.reasons else "."
        if taken is not None and saved is not None:
            text += f" {_saving(taken, default, saved)}"
    return {**out, "text": text}


def _saved(default: Candidate | None, taken: Candidate | None) -> float | None:
    if default is None or taken is None or default.median_us is None or taken.median_us is None:
        return None
    return default.median_us - taken.median_us


def _saving(taken: Candidate, default: Candidate, saved: float) -> str:
    base = default.median_us or 0.0
    share = f"{abs(saved):.1f} us a call, {100 * abs(saved) / base:.0f} %" if base else "nothing"
    if _overlap(taken, default):
        return "Their intervals overlap, so the choice neither costs nor saves time that shows."
    if saved > 0:
        return f"The choice saves {share}."
    if default.verdict == "safe":
        return f"The choice costs {share}."
    return f"The choice costs {share}: the price of one that is safe."


def _overlap(a: Candidate, b: Candidate) -> bool:
    if a.lo_us is None or a.hi_us is None or b.lo_us is None or b.hi_us is None:
        return False
    return a.lo_us <= b.hi_us and b.lo_us <= a.hi_us


def _price(taken: Candidate | None, group: Sequence[Candidate]) -> dict[str, Any]:
    """What safety costs: against the fastest of all, safe or not; and the gain over the floor."""
    out: dict[str, Any] = {"faster_unproven": None, "costs_us": None, "gain_over_floor": None}
    if taken is None or taken.median_us is None:
        return {**out, "text": ""}
    parts = []
    # A reference line is no candidate.
    others = [c for c in group if c.rank is None and not reference_line(c)]
    timed = [(c.median_us, c.backend, c) for c in others if c.median_us is not None]
    if timed:
        time, name, fastest = min(timed)
        if time < taken.median_us and not _overlap(fastest, taken):
            out.update(faster_unproven=name, costs_us=taken.median_us - time)
            unnamed = without_name(fastest)
            why = f"{fastest.verdict}, and {unnamed}" if unnamed else fastest.verdict
            parts.append(
                f"The fastest of all is {name} at {_time_with_interval(fastest)}, which is {why}: "
                f"leaving it out costs {taken.median_us - time:.1f} us a call."
            )
    floor = next((c for c in group if c.backend in FLOORS and c.median_us is not None), None)
    if floor is not None and floor is not taken and floor.median_us is not None:
        gain = floor.median_us / taken.median_us
        out["gain_over_floor"] = gain
        parts.append(f"The floor, {floor.backend}, takes {gain:.1f} times as long.")
    return {**out, "text": " ".join(parts)}
