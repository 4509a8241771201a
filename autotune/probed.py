"""The rows that say that a layer, or a quantiser, is probed to its end, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..cache.rows import BucketKey, Probed
from .evidence.method import method, method_of
from .evidence.recorder import Recorder
from .history import Entry, Recalled
from .keys import bucket_key
from .layer import Entrant, ProbedLayer
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Done:
    """How a layer was measured: since when (seconds since 1970), under which doubts of controls,
    and what was known of its entrants before."""

    since: float
    doubts: Iterable[str] = ()
    before: Recalled | None = None


def probed(
    plan: Plan, layer: ProbedLayer, entrants: Sequence[Entrant], record: Recorder, done: Done
) -> Probed:
    """The row that says that a layer is done: all that came since `done.since` is committed."""
    found: dict[str, Entry] = {}
    before = done.before or Recalled()
    for entrant in entrants:
        runs = [*before.runs(entrant.name), record.run]
        if entrant.known:
            found[entrant.name] = {**before.entries[entrant.name], "runs": runs}
            continue
        how = {**_how(plan, entrant.name, record, done), "runs": runs}
        if (part := before.started.get(entrant.name)) is not None:
            how["at"] = min(part.at, done.since)
            how["seed"] = plan.seed if part.seeds <= {plan.seed} else None
        found[entrant.name] = {**how, **_measured(layer, entrant)}
    detail = {"samples": plan.level.samples, "again": plan.again, "entrants": found}
    if layer.timed:
        detail["timed"] = layer.timed
    return Probed(record.run, bucket_key(layer.problem), plan.device, method(), detail)


def entered(
    plan: Plan, layer: ProbedLayer, entrant: Entrant, record: Recorder, done: Done
) -> dict[str, Any]:
    """How a backend is going to be measured on a layer, for the row that says it is begun."""
    how = _how(plan, entrant.name, record, done)
    return {**how, **_measured(layer, entrant), "device": plan.device}


def probed_quantiser(
    plan: Plan, name: str, bucket: BucketKey, record: Recorder, since: float
) -> Probed:
    """The row that says that an activation quantiser is done."""
    how = {name: _how(plan, name, record, Done(since))}
    detail = {"samples": 0, "entrants": how}
    return Probed(record.run, bucket, plan.device, method(), detail)


def _measured(layer: ProbedLayer, entrant: Entrant) -> dict[str, Any]:
    return {
        "begins_mlp": layer.begins_mlp,
        "tactics": [[m.lo, m.hi, list(names)] for m, names in entrant.tactics.items()],
        "winner": [[m.lo, m.hi, tactic] for m, tactic in entrant.winner.items()],
        "dead": dict(entrant.dead),
        "reference_line": entrant.reference_line,
    }


def _how(plan: Plan, backend: str, record: Recorder, done: Done) -> dict[str, Any]:
    """What decides whether evidence may serve another run."""
    level = asdict(plan.level)
    return {
        "fingerprint": record.fingerprint(backend),
        "method": method_of(backend),
        "runs": [record.run],
        "at": done.since,
        "seed": plan.seed,
        "level": {k: list(v) if isinstance(v, tuple) else v for k, v in level.items()},
        "hang_seconds": plan.hang_seconds,
        "doubts": sorted(done.doubts),
    }
