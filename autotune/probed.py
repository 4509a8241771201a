"""The rows that say that a layer, or a quantiser, is probed to its end, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..cache.rows import BucketKey, Probed
from .evidence.method import method, method_of
from .evidence.recorder import Recorder
from .history import Entry
from .keys import bucket_key
from .layer import Entrant, ProbedLayer
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Done:
    """How a layer was measured: since when (seconds since 1970), under which doubts of controls,
    and what was known of its entrants before."""

    since: float
    doubts: Iterable[str] = ()
    before: Mapping[str, Entry] | None = None


def probed(
    plan: Plan, layer: ProbedLayer, entrants: Sequence[Entrant], record: Recorder, done: Done
) -> Probed:
    """The row that says that a layer is done: all that came since `done.since` is committed."""
    found: dict[str, Entry] = {}
    for entrant in entrants:
        if entrant.known:
            before = (done.before or {})[entrant.name]
            found[entrant.name] = {**before, "runs": [*before["runs"], record.run]}
        else:
            how = _how(plan, entrant.name, record, done)
            found[entrant.name] = {**how, **_measured(layer, entrant)}
    detail = {"samples": plan.level.samples, "again": plan.again, "entrants": found}
    return Probed(record.run, bucket_key(layer.problem), plan.device, method(), detail)


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
