"""What earlier probes published, and how a new probe joins it.

A probe of one model, one GPU or one backend must not take away what is known of the others; and
what was measured in another environment must not stay beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache import codec, snapshot, state
from ...cache.errors import Corrupt, Missing
from ...cache.rows import Candidate, Choice, Environment, Layer, Stamp


@dataclass(frozen=True, slots=True)
class Publication:
    """The published rows. `generation` is 0 where nothing is published yet."""

    generation: int
    meta: dict[str, Any]
    choices: tuple[Choice, ...]
    candidates: tuple[Candidate, ...]
    environments: tuple[Environment, ...]
    layers: tuple[Layer, ...] = ()


def load(state_dir: Path, generation: int | None = None) -> Publication:
    """What `state_dir` publishes, or published as one of the generations that are kept.

    Raises Missing where it publishes nothing, and Foreign, NewerSchema or Corrupt.
    """
    place = os.fspath(state_dir)
    path = os.path.join(place, state.CHOICES)
    if generation is not None:
        path = state.generation_file(place, generation)
    loaded = snapshot.load(path)
    tables = loaded.tables
    stamps: dict[str, list[Stamp]] = {}
    for row in tables["stamp"]:
        stamps.setdefault(row["fingerprint"], []).append(codec.decode(Stamp, row))
    return Publication(
        loaded.generation,
        loaded.meta,
        tuple(codec.decode(Choice, row) for row in tables["choice"]),
        tuple(codec.decode(Candidate, row) for row in tables["candidate"]),
        tuple(
            codec.decode(Environment, {**row, "stamps": tuple(stamps.get(row["fingerprint"], ()))})
            for row in tables["environment"]
        ),
        tuple(codec.decode(Layer, row) for row in tables["layer"]),
    )


def usable(state_dir: Path) -> Publication:
    """`load`, with a missing or damaged file as nothing: publishing is what mends it."""
    try:
        return load(state_dir)
    except (Missing, Corrupt):
        return Publication(0, {}, (), (), ())


def join(
    standing: Publication,
    candidates: Sequence[Candidate],
    environments: Sequence[Environment],
) -> tuple[list[Candidate], list[Environment]]:
    """New candidates with the standing ones that still hold beside them.

    A standing candidate stays where the probe did not measure its (bucket, backend) again, unless
    the probe saw its backend in another environment than the candidate's: then it is stale.
    """
    measured = {c.place for c in candidates}
    current = {(e.arch, e.backend): e.fingerprint for e in environments}
    devices = {(c.arch, c.gpu) for c in candidates}
    kept = [
        c
        for c in standing.candidates
        if c.place not in measured
        and (
            (c.arch, c.gpu) not in devices
            or current.get((c.arch, c.backend), c.fingerprint) == c.fingerprint
        )
    ]
    everyone = [*candidates, *kept]
    wanted = {c.fingerprint for c in everyone}
    known = {e.fingerprint: e for e in (*standing.environments, *environments)}
    return everyone, [e for print_, e in known.items() if print_ in wanted]


def by_scope(candidates: Iterable[Candidate]) -> dict[tuple[str, str, str], list[Candidate]]:
    """Candidates by (arch, gpu, profile): choices are made within one."""
    scopes: dict[tuple[str, str, str], list[Candidate]] = {}
    for candidate in candidates:
        scopes.setdefault(candidate.scope, []).append(candidate)
    return scopes
