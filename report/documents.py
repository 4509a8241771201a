"""What the state directory says, as JSON documents: one problem, or everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..autotune import checkpoint_check
from ..autotune.choice import layouts
from ..autotune.choice.single import experts_layers
from ..autotune.evidence.wording import witnessed
from ..autotune.publication import published
from ..autotune.verdict.profiles import PROFILES
from ..autotune.verdict.statistics import failure_bound
from ..cache import experts as routed
from ..cache import reader, state
from ..cache.decision import Decision
from ..cache.errors import Corrupt, Foreign, Missing, NewerSchema, StateError
from ..cache.ledger import Ledger
from ..cache.rows import Candidate, Finding, Forgotten, Run, Timing, Where
from ..engines import names
from ..probes.problem import Problem
from ..words import experts_key

if TYPE_CHECKING:
    from ..autotune.plan import Report


def place_of(state_dir: Path | None) -> Path:
    """Where to read: the directory given, else the first place that holds a choices.db.

    Raises Missing where there is none.
    """
    if state_dir is not None:
        return state_dir
    holding = state.holding()
    if not holding:
        raise state.nothing_published()
    return holding[0]


def decision(
    state_dir: Path | None, problem: Problem, profile: str | None = None
) -> dict[str, Any]:
    """What the engine's reader answers for one problem, and the bound behind it."""
    p = problem
    reading = reader.open(place_of(state_dir), profile=profile)
    found = reading.choose(p.m, p.n, p.k, p.format, p.activation, p.out_dtype, p.groups)
    answer = {name: getattr(found, name) for name in found.__slots__}
    answer["failure_bound_95"] = failure_bound(found.problems)
    answer["problem"] = asdict(problem)
    return answer


def alternatives(
    state_dir: Path | None, problem: Problem, profile: str | None = None
) -> tuple[Decision, ...]:
    """All that may be chosen for one problem, best first."""
    p = problem
    reading = reader.open(place_of(state_dir), profile=profile)
    return reading.alternatives(p.m, p.n, p.k, p.format, p.activation, p.out_dtype, p.groups)


def scope(state_dir: Path | None, profile: str | None = None) -> tuple[str, str, str] | None:
    """(arch, GPU model, profile) that a problem is answered from; None where several fit."""
    return reader.open(place_of(state_dir), profile=profile).scope()


def compared(stands: published.Publication) -> list[layouts.Comparison]:
    """The weight layouts of every layer, as published."""
    groups: dict[layouts.Key, list[Candidate]] = {}
    for candidate in stands.candidates:
        groups.setdefault(layouts.key_of(candidate), []).append(candidate)
    return [layer_of(stands, group) for group in groups.values()]


def layer_of(stands: published.Publication, candidates: Sequence[Candidate]) -> layouts.Comparison:
    """The layouts of one layer, of which these are all candidates, with the one published."""
    traffics = layouts.traffics_of(stands.meta)
    timed = layouts.quantisers_of(stands.meta)
    (found,) = layouts.compare_all(candidates, traffics, stands.layers, timed)
    rows = {layouts.key_of_row(row): row.layout for row in stands.layers}
    if found.layout == rows.get(found.key):
        return found
    return replace(
        found,
        layout=rows.get(found.key),
        layer_us=None,
        reason="this is not what was published; the next fp4tune probe chooses anew",
    )


def layer(
    state_dir: Path | None, problem: Problem, profile: str | None = None
) -> dict[str, Any] | None:
    """The layouts of a problem's layer, whatever its m, as a document, None where it was not
    probed; with ``crossing``, whether the other activation would be faster."""
    place = place_of(state_dir)
    scope = reader.open(place, profile=profile).scope()
    if scope is None:
        return None
    p = problem
    found = {each.key: each for each in compared(published.load(place))}
    mine = found.get((*scope, p.format, p.activation, p.out_dtype, p.groups, p.n, p.k))
    if mine is None:
        return None
    crossed = layouts.crossings(found.values())
    crossing = crossed.get((*scope, p.format, "bf16", p.out_dtype, p.groups, p.n, p.k))
    return {**mine.json(), "crossing": asdict(crossing) if crossing else None}


def for_checkpoint(
    state_dir: Path | None,
    checkpoint: Path,
    answer: Mapping[str, Any],
    profile: str | None = None,
) -> dict[str, Any]:
    """A `decision` held against a checkpoint's weights, as `checkpoint_check.assess` has it; where
    they break its conditions, ``instead`` is the next candidate whose conditions they do not break.

    Raises Refused where the checkpoint was not checked.
    """
    place = place_of(state_dir)
    record = checkpoint_check.find(checkpoint, place)
    p = answer["problem"]
    assessed = checkpoint_check.assess(record, answer["conditions"], p["format"], p["out_dtype"])
    instead = None
    if assessed["status"] == "broken":
        question = (p["m"], p["n"], p["k"], p["format"], p["activation"], p["out_dtype"])
        for other in reader.open(place, profile=profile).alternatives(*question, p["groups"]):
            its = checkpoint_check.assess(record, other.conditions, p["format"], p["out_dtype"])
            if other.status == "safe" and its["status"] == "holds":
                names = ("backend", "tactic", "layout", "median_us")
                instead = {name: getattr(other, name) for name in names}
                break
    return {**assessed, "instead": instead}


def stored_findings(place: Path) -> tuple[list[Finding], list[Run]]:
    """Findings of the environments that are current, and all runs; none without a ledger."""
    try:
        with Ledger.open(place, readonly=True) as ledger:
            current = {c.fingerprint for c in published.load(place).candidates if c.fingerprint}
            return ledger.findings(fingerprints=sorted(current)), ledger.runs()
    except StateError:
        return [], []


def stored_timings(place: Path) -> list[Timing]:
    """The newest times of routed experts under each routing law, of the environments that are
    current; none without a ledger."""
    try:
        with Ledger.open(place, readonly=True) as ledger:
            current = {c.fingerprint for c in published.load(place).candidates if c.fingerprint}
            rows = ledger.timings(fingerprints=sorted(current))
    except StateError:
        return []
    newest: dict[Where, Timing] = {}
    for row in rows:
        if row.bucket.groups > 1:
            newest[row.where] = row
    return list(newest.values())


def damage(place: Path) -> list[str]:
    """What of the ledger is not as it was stored, in sentences; none without a ledger."""
    try:
        with Ledger.open(place, readonly=True) as ledger:
            return ledger.damage().sentences
    except Missing:
        return []
    except StateError as error:
        return [str(error)]


def forgotten(place: Path) -> list[Forgotten]:
    """What was taken back, and why; none without a ledger."""
    try:
        with Ledger.open(place, readonly=True) as ledger:
            return ledger.forgotten()
    except StateError:
        return []


def ledger_problem(place: Path) -> str | None:
    """Why the ledger of `place` cannot be read, in a sentence; None where it can, or where there is
    none: a damaged one is not a missing one."""
    try:
        with Ledger.open(place, readonly=True):
            return None
    except (Corrupt, Foreign, NewerSchema) as error:
        return str(error)
    except StateError:
        return None  # not there, or its owner's alone to read


def as_json(place: Path) -> dict[str, Any]:
    """Everything that is stored and holds, as one JSON document."""
    stored = published.load(place)
    found, runs = stored_findings(place)
    return {
        "generation": stored.generation,
        "meta": stored.meta,
        "choices": [asdict(row) for row in stored.choices],
        "candidates": [asdict(row) for row in stored.candidates],
        "layers": [each.json() for each in compared(stored)],
        "experts": [each.json() for each in experts_of(stored.candidates, stored.meta)],
        "environments": [_with_dicts(asdict(row)) for row in stored.environments],
        "findings": [_finding_document(row) for row in found],
        "runs": [_with_dicts(asdict(row)) for row in runs],
        "damaged": damage(place),
        "forgotten": [asdict(row) for row in forgotten(place)],
    }


def probe_json(report: Report) -> dict[str, Any]:
    """One finished probe as a JSON document."""
    return {
        "run": report.run,
        "seed": report.seed,
        "device": {
            "name": report.target.name,
            "arch": report.target.device.arch,
            "uuid": report.target.uuid,
        },
        "generation": report.generation,
        "choices": [asdict(row) for row in report.choices],
        "layers": [each.json() for each in report.layers],
        "candidates": [asdict(row) for row in report.candidates],
        "findings": [_finding_document(row) for row in report.findings],
        "timings": [_with_dicts(asdict(row)) for row in report.timings],
        "experts": [each.json() for each in experts_of(report.candidates)],
        "audits": [asdict(row) for row in report.audits],
        "known": report.known,
        "unsupported": report.unsupported,
        "broken": report.broken,
        "build_seconds": report.build_seconds,
        "build_wall_seconds": report.build_wall_seconds,
        "seconds": report.seconds,
        "left": report.left,
        "set_aside": report.set_aside,
        "spent": report.spent,
    }


@dataclass(frozen=True, slots=True)
class ExpertsOfModel:
    """Routed experts of one format and gate, which is what one model has: their layers, as
    published, and what one backend for all of them costs."""

    scope: tuple[str, str, str]
    format: str
    gate: str
    layers: tuple[routed.ExpertsLayer, ...]
    default: str | None
    singles: tuple[routed.SingleBackend, ...]

    def json(self) -> dict[str, Any]:
        named = dict(zip(("arch", "gpu", "profile"), self.scope, strict=True))
        options = [routed.option_text(asdict(each.layer)) for each in self.layers]
        return {
            **named,
            "format": self.format,
            "gate": self.gate,
            "layers": options,
            "traffic": self.layers[0].traffic,
            "covered": min(each.covered for each in self.layers),
            "default": self.default,
            "single": [each.json() for each in self.singles],
        }


def experts_of(
    candidates: Sequence[Candidate], meta: Mapping[str, Any] | None = None
) -> list[ExpertsOfModel]:
    """The routed experts among published candidates; `meta` has the traffic they are weighed by,
    the profiles' own without it."""
    groups: dict[tuple[Any, ...], list[routed.ExpertsLayer]] = {}
    for each in experts_layers(candidates, layouts.traffics_of(meta or {})):
        key = experts_key(each.layer.activation)
        gate = key.gate if key else ""
        groups.setdefault((each.scope, each.layer.format, gate), []).append(each)
    found = []
    for (scope, format_, gate), layers in groups.items():
        profile = PROFILES.get(scope[2], PROFILES["strict"])
        default = profile.default_of(names.sm_of(scope[0]), layers[0].layer.bucket(1, 1))
        singles = tuple(routed.single_backends(layers, default))
        found.append(ExpertsOfModel(scope, format_, gate, tuple(layers), default, singles))
    return found


def _finding_document(row: Finding) -> dict[str, Any]:
    """A finding, with what the witness would have seen of it in production."""
    return {**_with_dicts(asdict(row)), "witness": witnessed(row)}


def _with_dicts(row: dict[str, Any]) -> dict[str, Any]:
    """Mappings that are not dicts are what `json` does not take."""
    return {
        key: dict(value) if hasattr(value, "keys") and not isinstance(value, dict) else value
        for key, value in row.items()
    }
