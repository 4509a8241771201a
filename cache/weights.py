"""What was found of a checkpoint's weights, kept in the state directory for that checkpoint alone.

One JSON file a checkpoint, named by its identity, which changes with any of its files: so what is
kept is never taken for another checkpoint, or for this one after a change. Standard library only.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..machine import files
from .errors import translate

FOLDER = "weights"
VERSION = 1
_MOST = 1 << 20


def store(
    state_dir: Path,
    identity: str,
    path: str,
    formats: Mapping[str, int],
    conditions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Keep what was found of the checkpoint at `path`; returns it as `load` does.

    `formats` are the FP4 weights by format, `conditions` as `probes.weights.Result.json`. Raises a
    StateError where it cannot be written.
    """
    record = {
        "version": VERSION,
        "identity": identity,
        "checkpoint": path,
        "at": time.time(),
        "formats": dict(formats),
        "conditions": [dict(each) for each in conditions],
    }
    place = _record_path(state_dir, identity)
    aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(json.dumps(record), encoding="utf-8")
            os.replace(aside, place)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise translate(error, place) from error
    return record


def load(state_dir: Path, identity: str) -> dict[str, Any] | None:
    """What is kept of a checkpoint; None where nothing is, or nothing that can be read."""
    place = _record_path(state_dir, identity)
    try:
        record = json.loads(files.whole(place, _MOST))
        if (record["version"], record["identity"]) != (VERSION, identity):
            return None
        for each in record["conditions"]:
            _ = each["id"], each["status"], each["out_dtype"], each["text"], each["first"]
        return {**record, "formats": dict(record["formats"])}
    except (FileNotFoundError, files.Irregular):
        return None
    except OSError as error:
        raise translate(error, place) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _record_path(state_dir: Path, identity: str) -> Path:
    return state_dir / FOLDER / f"{identity[:32]}.json"
