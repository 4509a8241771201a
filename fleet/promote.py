"""Generations of choices for the fleet: candidate, canary, promoted, or rolled back.

What happened is a list of small files in ``<store>/events``, never changed; the present state is
their sum, in the order of their times.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UNSAFE, Refused
from . import report
from .places import Place
from .warehouse import Warehouse

FOLDER = "events"
LEAST_SUPPORT = 2
"""Nodes that must have proven a choice for the fleet to hand it on."""
MOST_CHANGED = 0.10

_BUCKET = "format, activation, out_dtype, groups, m_lo, m_hi, n, k"
_PROVEN = f"""
SELECT arch, gpu, profile, {_BUCKET}, backend, tactic, layout, fingerprint,
       count(DISTINCT node) AS nodes
FROM choice WHERE status = 'safe' AND fingerprint IS NOT NULL GROUP BY ALL
HAVING count(DISTINCT node) >= {LEAST_SUPPORT}
ORDER BY arch, gpu, profile, {_BUCKET}, nodes DESC, backend, tactic, layout, fingerprint
"""
_PRESENT = f"SELECT node, arch, gpu, profile, {_BUCKET}, backend FROM choice WHERE status = 'safe'"
_KEY = ("arch", "gpu", "profile", *_BUCKET.split(", "))


def events(place: Place) -> list[dict[str, Any]]:
    """What happened, oldest first. Raises Refused for a file that is none of `record`'s."""
    found = []
    for name in place.names(FOLDER):
        if name.endswith(".json") and not name.startswith("."):
            try:
                event = json.loads(place.read(FOLDER, name))
                found.append((float(event["at"]), name, event))
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                where = place.path(FOLDER, name)
                raise Refused(
                    f"{where} is not an event of a fleet; remove it, or mend it"
                ) from None
    return [event for _, _, event in sorted(found, key=lambda e: e[:2])]


def record(place: Place, event: Mapping[str, Any]) -> None:
    """Add an event. Raises Refused where the store cannot be written."""
    name = f"{int(event['at'] * 1000):015d}-{secrets.token_hex(4)}.json"
    try:
        place.write((json.dumps(event) + "\n").encode(), FOLDER, name)
    except OSError as error:
        raise Refused(f"the store {place.url} cannot be written: {error}") from None


def current(happened: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The newest generation: ``number``, ``stage``, ``percent``, ``at``, ``choices``; after a
    rollback, the one promoted before it, if any, under the stage ``promoted``."""
    states: dict[int, dict[str, Any]] = {}
    for event in happened:
        if "number" in event:
            states.setdefault(event["number"], {}).update(event)
    standing = [s for s in states.values() if s["stage"] != "rolled back"]
    return max(standing, key=lambda s: s["number"], default=None)


def in_canary(node: str, number: int, percent: float) -> bool:
    """Whether a node belongs to a generation's canaries: decided by a hash of both, so that every
    node knows by itself, and other nodes go first each time."""
    drawn = int(hashlib.sha256(f"{number}/{node}".encode()).hexdigest()[:12], 16) / 16**12
    return drawn < percent / 100


def promote(
    store: str,
    percent: float = 5.0,
    most_changed: float = MOST_CHANGED,
    force: bool = False,
) -> dict[str, Any]:
    """Take the next step: a new candidate, candidate to canary, canary to promoted.

    A canary is promoted only if canaries have reported since, and is rolled back instead where one
    of its choices failed on any of them. Refused, with exit code 1, where nothing is proven, no
    canary has reported, or more than `most_changed` of the nodes would change their choice at once.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"--canary {percent:g}: a percentage is above 0 and at most 100")
    place = Place(store)
    with Warehouse(store) as warehouse:
        now = round(time.time(), 3)
        happened = events(place)
        state = current(happened)
        if state is None or state["stage"] == "promoted":
            numbers = [event["number"] for event in happened if "number" in event]
            number = max(numbers, default=0) + 1
            found = choices(warehouse)
            if not found:
                raise Refused(f"{LEAST_SUPPORT} nodes must have proven one and the same", UNSAFE)
            event = {"number": number, "stage": "candidate", "at": now, "choices": found}
        elif state["stage"] == "candidate":
            _breaker(warehouse, state["choices"], percent / 100, most_changed, force)
            event = {"number": state["number"], "stage": "canary", "percent": percent, "at": now}
        else:
            event = {"number": state["number"], "at": now}
            event.update(_after_canary(warehouse, state))
            if event["stage"] == "promoted":
                _breaker(warehouse, state["choices"], 1.0, most_changed, force)
        record(place, event)
    return {**(state or {}), **event} if event["stage"] != "candidate" else event


def rollback(store: str, reason: str = "asked for") -> dict[str, Any]:
    """Roll the newest generation back. Raises Refused where there is none."""
    place = Place(store)
    state = current(events(place))
    if state is None:
        raise Refused(f"{store} has no generation to roll back")
    event = {
        "number": state["number"],
        "stage": "rolled back",
        "at": round(time.time(), 3),
        "reason": reason,
    }
    record(place, event)
    return {**state, **event}


def choices(warehouse: Warehouse) -> list[dict[str, Any]]:
    """For each (GPU model, profile, bucket) what most nodes have proven, builds under suspicion
    left out. A choice holds for its environment alone."""
    suspected = {
        (b["arch"], b["backend"], b["fingerprint"])
        for b in report.suspect_builds(report.attributed(warehouse))
    }
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in warehouse.rows(_PROVEN):
        if (row["arch"], row["backend"], row["fingerprint"]) not in suspected:
            key = *(row[name] for name in _KEY), row["fingerprint"]
            best.setdefault(key, row)
    return list(best.values())


def _breaker(
    warehouse: Warehouse,
    wanted: Sequence[Mapping[str, Any]],
    share: float,
    most: float,
    force: bool,
) -> None:
    """Refuses a step by which too many nodes would give up what they run."""
    names: dict[tuple[Any, ...], set[str]] = {}
    for row in wanted:
        names.setdefault(tuple(row[n] for n in _KEY), set()).add(row["backend"])
    nodes: set[str] = set()
    changed: set[str] = set()
    for row in warehouse.rows(_PRESENT):
        nodes.add(row["node"])
        here = names.get(tuple(row[n] for n in _KEY))
        if here is not None and row["backend"] not in here:
            changed.add(row["node"])
    if nodes and not force and share * len(changed) / len(nodes) > most:
        raise Refused(
            f"not promoted: {len(changed)} of {len(nodes)} nodes would change their choice, more "
            f"than {most:.0%} at once; use --force if that is right",
            UNSAFE,
        )


def _after_canary(warehouse: Warehouse, state: Mapping[str, Any]) -> dict[str, Any]:
    started, percent, number = state["at"], state["percent"], state["number"]
    reported = {
        row["node"]
        for row in warehouse.rows("SELECT node FROM run WHERE started >= ?", started)
        if in_canary(row["node"], number, percent)
    }
    if not reported:
        raise Refused(
            f"no canary of generation {number} has reported since it began; export on those nodes "
            "and merge, then try again",
            UNSAFE,
        )
    chosen = {(c["backend"], c["fingerprint"]) for c in state["choices"]}
    failed = sorted(
        {
            row["node"]
            for row in warehouse.rows(
                "SELECT DISTINCT e.node, e.backend, e.fingerprint FROM evidence e JOIN run r "
                "ON e.node = r.node AND e.run = r.id "
                "WHERE e.status = 'failed' AND r.started >= ?",
                started,
            )
            if row["node"] in reported and (row["backend"], row["fingerprint"]) in chosen
        }
    )
    if failed:
        reason = f"its choices failed on {len(failed)} of {len(reported)} canaries"
        return {"stage": "rolled back", "reason": reason, "nodes": failed[:100]}
    return {"stage": "promoted", "canaries": len(reported)}
