"""What a node remembers of the advisories it took: how far each signer had counted, which of its
quarantines come from which advisory, and which of those were lifted here.

A small file in the state directory. Standard library only: lifting a quarantine needs it, too.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cache import state
from ..cache.errors import Corrupt, translate
from ..machine import files

FILE = "advisories.json"
_MOST = 16 << 20
_WAIT = 30.0


@dataclass(slots=True)
class Taken:
    """`serials`: signer's key (empty for nobody's) -> number and digest of the last file taken;
    `quarantines`: id -> advisory; `lifted`: advisory -> when."""

    serials: dict[str, list[Any]] = field(default_factory=dict)
    quarantines: dict[str, str] = field(default_factory=dict)
    lifted: dict[str, float] = field(default_factory=dict)


def locked(place: Path) -> state.exclusive:
    """Held while one is changed: two imports at once wait for each other."""
    return state.exclusive(
        state.lock_file(place, "import", "advisories"), "the taking of advisories", wait=_WAIT
    )


def load(place: Path) -> Taken:
    """What is remembered; nothing where there is no file. Raises StateError for a damaged one:
    what was counted must not be forgotten unnoticed."""
    path = place / FILE
    try:
        found = json.loads(files.whole(path, _MOST))
        taken = Taken(found["serials"], found["quarantines"], found["lifted"])
        fits = all(type(v) is dict for v in (taken.serials, taken.quarantines, taken.lifted))
        if fits and all(_is_count(entry) for entry in taken.serials.values()):
            return taken
    except FileNotFoundError:
        return Taken()
    except files.Irregular:
        pass
    except OSError as error:
        raise translate(error, path) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise Corrupt(
        path,
        "this does not say which advisories were taken; remove the file to start anew, and then "
        "old advisories can be taken once more",
    )


def _is_count(entry: Any) -> bool:
    return (
        type(entry) is list
        and len(entry) == 2
        and type(entry[0]) is int
        and isinstance(entry[1], str)
    )


def save(taken: Taken, place: Path) -> None:
    """Write the file, whole or not at all. Raises StateError."""
    path = place / FILE
    temporary = place / f".{FILE}.{secrets.token_hex(4)}"
    try:
        with open(temporary, "x", encoding="ascii") as file:
            json.dump(asdict(taken), file, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise translate(error, path) from error


def note_lifted(identities: Iterable[str], place: Path) -> list[str]:
    """Remember that these quarantines were lifted here; the advisories they came from, which no
    import quarantines again by itself. Raises StateError."""
    if not (place / FILE).exists():
        return []
    with locked(place):
        taken = load(place)
        known = {taken.quarantines.pop(each) for each in identities if each in taken.quarantines}
        if known:
            taken.lifted.update(dict.fromkeys(known, round(time.time(), 3)))
            save(taken, place)
    return sorted(known)
