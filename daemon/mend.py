"""The child that brings the state in line: mends what is damaged, then `revalidate`.

Reads ``{"state": ..., "machine": ...}`` from standard input and prints one JSON document:
``generation`` (the one that stands), ``published`` (whether it is new), ``stale`` (a list of
device, backend, changes), ``mended`` (sentences), ``damaged`` (sentences, of what the ledger holds)
and ``again`` (layers that are to be measured anew for it). A process of its own, since it needs
torch's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from ..cache import publish, snapshot, state
from ..cache.errors import Corrupt, Foreign, Missing, StateError
from ..cache.ledger import Ledger
from ..cache.salvage import salvage


def mend(state_dir: Path) -> list[str]:
    """Make ledger.db and choices.db usable again where they are damaged or gone; what was done.

    A damaged ledger is moved aside, never removed; the rows of it that are as they were stored go
    into a new one. Of a choices.db that is gone the last generation
    is put back, where the file kept beside it is whole; else one is published again, from the
    ledger or from an older file. Raises StateError.
    """
    done = []
    number = publish.restore(state_dir)
    if number is not None:
        done.append(f"{state.CHOICES} was gone or damaged: generation {number} was put back")
    for attempt in (True, False):
        try:
            Ledger.open(state_dir).close()
            break
        except (Corrupt, Foreign) as error:
            if not attempt:
                raise
            aside = _aside(state_dir)
            Ledger.open(state_dir).close()
            saved = salvage(os.fspath(state_dir / aside), os.fspath(state_dir))
            done.append(
                f"{error.sentence}: {state.LEDGER} was moved aside as {aside}, and {saved} rows "
                "of it were saved"
            )
    try:
        snapshot.load(os.fspath(state_dir / state.CHOICES))
        return done
    except (Missing, Corrupt):
        pass
    with Ledger.open(state_dir) as ledger:
        numbers = publish.kept(ledger)
    for number in reversed(numbers):
        with contextlib.suppress(Missing, Corrupt):
            new = publish.rollback(state_dir, number)
            done.append(f"{state.CHOICES} was gone or damaged: the kept {number} is {new} now")
            break
    return done


def damage(state_dir: Path) -> tuple[list[str], list[tuple[int, int]]]:
    """What of the ledger is not as it was stored, in sentences; and the layers, as (n, k), of which
    no run that is whole is left. Raises StateError."""
    with Ledger.open(state_dir) as ledger:
        found = ledger.damage()
        lost = {row.bucket.layer for run in found.runs for row in ledger.evidence(run=run)}
        lost |= {row.bucket.layer for row in ledger.probed() if row.run in found.runs}
        for row in ledger.probed():
            runs = [row.run, *(r for how in row.detail["entrants"].values() for r in how["runs"])]
            if not found.runs.keys() & set(runs):
                lost.discard(row.bucket.layer)
        return found.sentences, sorted({(layer.n, layer.k) for layer in lost if layer.n})


def _aside(state_dir: Path) -> str:
    name = f"{state.LEDGER}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    while (state_dir / name).exists():
        name += "+"
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            os.rename(state_dir / f"{state.LEDGER}{suffix}", state_dir / f"{name}{suffix}")
    return name


def main() -> None:
    asked = json.load(sys.stdin)
    state_dir = Path(asked["state"])
    answer: dict[str, object] = {"generation": 0, "published": False, "stale": [], "mended": []}
    try:
        answer["mended"] = mend(state_dir)
        answer["damaged"], answer["again"] = damage(state_dir)
        from ..autotune.publication.revalidate import revalidate

        revalidated = revalidate(state_dir, asked["machine"], dict(os.environ))
        answer["generation"] = revalidated.stands.generation
        answer["published"] = revalidated.generation is not None
        answer["stale"] = [[*key, list(why)] for key, why in sorted(revalidated.stale.items())]
    except Missing:
        pass  # nothing is published yet
    except StateError as error:
        answer["error"] = str(error)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
