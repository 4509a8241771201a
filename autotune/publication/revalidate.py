"""Published choices brought in line with what is here: nothing rests on evidence that is stale.

A candidate whose environment is no longer the one here is withdrawn: it stays listed,
inconclusive, with the reason, until it is probed again. Its place is taken by the next that still
holds, or by the floor. What was published earlier and holds again (a wheel that was rolled back)
comes back at once.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...cache import codec, state
from ...cache.errors import StateError
from ...cache.ledger import Ledger
from ...cache.rows import Candidate, Environment, Stamp
from . import publish, published
from .environment import EnvironmentCheck, Machine, compare_with_now, withdraw, withdrawn


@dataclass(frozen=True, slots=True)
class Revalidated:
    """`generation` is the new one, None where all was in line. `stale`: (device, backend) to what
    changed, of every withdrawn candidate whose device is here."""

    generation: int | None
    stands: published.Publication
    stale: Mapping[tuple[str, str], tuple[str, ...]]


def revalidate(state_dir: Path, machine: Machine, environ: Mapping[str, str]) -> Revalidated:
    """Withdraw what is stale, bring back what holds again, and refresh the stamps of files that
    were replaced by their like; publish if any of that changes what stands.

    Raises Missing where nothing is published yet, and any StateError, having changed nothing.
    """
    with state.exclusive(state.lock_file(state_dir, "join"), "the publication", wait=60):
        stands = published.load(state_dir)
        seen: dict[str, EnvironmentCheck | None] = {
            e.fingerprint: compare_with_now(e, machine, environ) for e in stands.environments
        }
        past = _Past(state_dir, machine, environ)
        candidates: list[Candidate] = []
        used: dict[str, Environment] = {e.fingerprint: e for e in stands.environments}
        stale: dict[tuple[str, str], tuple[str, ...]] = {}
        for candidate in stands.candidates:
            found = seen.get(candidate.fingerprint or "")
            if found is None:
                candidates.append(candidate)
                continue
            if not found.changes:
                used[found.environment.fingerprint] = found.environment
                if not withdrawn(candidate):
                    candidates.append(candidate)
                    continue
            other = past.holding(candidate)
            if other is not None:
                candidates.append(other[0])
                used[other[1].fingerprint] = other[1]
                continue
            changes = found.changes or ("the evidence is no longer kept",)
            stale[candidate.gpu, candidate.backend] = changes
            candidates.append(candidate if withdrawn(candidate) else withdraw(candidate, changes))
        wanted = {c.fingerprint for c in candidates}
        environments = [e for print_, e in used.items() if print_ in wanted]
        before = {e.fingerprint: frozenset(e.stamps) for e in stands.environments}
        after = {e.fingerprint: frozenset(e.stamps) for e in environments}
        if candidates == list(stands.candidates) and before == after:
            return Revalidated(None, stands, stale)
        generation = publish.republish(state_dir, stands, candidates, environments)
        return Revalidated(generation, published.load(state_dir), stale)


@dataclass
class _Past:
    """Earlier publications, read from the ledger when they are first needed."""

    state_dir: Path
    machine: Machine
    environ: Mapping[str, str]

    def holding(self, candidate: Candidate) -> tuple[Candidate, Environment] | None:
        """The last one of this place that was published and whose environment is here now."""
        return self._holding.get(candidate.place)

    @cached_property
    def _holding(self) -> dict[tuple[object, ...], tuple[Candidate, Environment]]:
        found: dict[tuple[object, ...], tuple[Candidate, Environment]] = {}
        checked: dict[str, EnvironmentCheck | None] = {}
        spent: set[tuple[object, ...]] = set()
        for candidates, environments in self._generations():
            for candidate in candidates:
                environment = environments.get(candidate.fingerprint or "")
                place = candidate.place
                if environment is None or place in found or withdrawn(candidate):
                    continue
                if (place, environment.fingerprint) in spent:
                    continue  # what was said of it last counts, and that did not hold
                spent.add((place, environment.fingerprint))
                print_ = environment.fingerprint
                if print_ not in checked:
                    checked[print_] = compare_with_now(environment, self.machine, self.environ)
                now = checked[print_]
                if now is not None and not now.changes:
                    found[place] = (candidate, now.environment)
        return found

    def _generations(self) -> Iterator[tuple[list[Candidate], dict[str, Environment]]]:
        """Candidates and environments of each publication that is kept, newest first."""
        try:
            with Ledger.open(self.state_dir, readonly=True) as ledger:
                for row in reversed(ledger.generations()):
                    content = ledger.generation_content(row.number)
                    if row.status == "published" and content is not None:
                        yield _rows_of_tables(json.loads(zlib.decompress(content)))
        except (StateError, ValueError, zlib.error):
            return


def _rows_of_tables(
    tables: dict[str, list[dict[str, object]]],
) -> tuple[list[Candidate], dict[str, Environment]]:
    stamps: dict[object, list[Stamp]] = {}
    for row in tables["stamp"]:
        stamps.setdefault(row["fingerprint"], []).append(codec.decode(Stamp, row))
    environments = [
        codec.decode(Environment, {**row, "stamps": tuple(stamps.get(row["fingerprint"], ()))})
        for row in tables["environment"]
    ]
    return (
        [codec.decode(Candidate, row) for row in tables["candidate"]],
        {e.fingerprint: e for e in environments},
    )
