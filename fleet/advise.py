"""Advisories: what the fleet knows of broken builds, for every node to quarantine at once."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from .. import __version__
from ..autotune.verdict import statistics
from ..cache.errors import translate
from ..errors import UNSAFE, Refused
from . import promote, report, signing
from .advisories import FORMAT, MOST_DAYS, VERSION, checked_advice
from .places import Place
from .warehouse import Warehouse

DAYS = 30.0
"""Days until nodes refuse a file: fleets publish more often, whatever has changed."""
MOST_LOST = 0.10
"""Share of the nodes with a choice that may lose it by one publication."""

_LOST = """
SELECT count(DISTINCT node) AS nodes FROM choice
WHERE status = 'safe' AND arch = $1 AND backend = $2 AND (fingerprint = $3 OR fingerprint IN (
  SELECT fingerprint FROM environment WHERE arch = $1 AND backend = $2 AND code = $4))
"""
_KINDS = """
SELECT kind, regime, data, count(*) AS findings, count(DISTINCT node) AS nodes FROM finding
WHERE arch = $1 AND gpu = $2 AND backend = $3 AND fingerprint = $4 GROUP BY ALL ORDER BY ALL
"""
_PROFILES = """
SELECT DISTINCT profile FROM verdict WHERE status = 'unsafe' AND arch = $1 AND backend = $2
AND fingerprint = $3 ORDER BY profile
"""


def advise(
    store: str,
    out: str,
    key_file: Path | None = None,
    most_lost: float = MOST_LOST,
    force: bool = False,
    days: float = DAYS,
) -> dict[str, Any]:
    """Write the store's advisories, and the generation of choices that is on its way, to `out`.

    Nodes take it for `days`, and never after one with a higher number. Refused, with exit code 1,
    where more than `most_lost` of the nodes with a safe choice would lose one by advisories that
    were not published before: a mistake must not stop a fleet.
    """
    if not 0 <= most_lost <= 1:
        raise ValueError(f"--max-loss {most_lost:g}: a share is between 0 and 1")
    if not 0 < days <= MOST_DAYS:
        raise ValueError(f"--days {days:g}: more than 0, and at most {MOST_DAYS:g}")
    place = Place(store)
    with Warehouse(store) as warehouse:
        series = report.attributed(warehouse)
        found = [_advisory(warehouse, build) for build in report.suspect_builds(series)]
        suspects = report.suspect_gpus(series)
        digest = hashlib.sha256("\n".join(warehouse.bundles()).encode()).hexdigest()
        nodes = warehouse.rows("SELECT count(DISTINCT node) AS n FROM choice")[0]["n"]
    events = promote.events(place)
    before = {name for event in events for name in event.get("advisories", ())}
    new = [a for a in found if a["id"] not in before]
    lost = sum(a["choices_lost_nodes"] for a in new)
    if not force and nodes and lost / nodes > most_lost:
        raise Refused(
            f"nothing is published: {lost} of {nodes} nodes would lose their choice at once, more "
            f"than {most_lost:.0%}; look at the report, and use --force if it is right",
            UNSAFE,
        )
    now = round(time.time(), 3)
    # By the clock, so that a store that is made anew does not begin to count again below what nodes
    # have taken; and above the last, whatever the clock says.
    serial = max(int(now), 1 + max((event.get("serial", 0) for event in events), default=0))
    promote.record(place, {"serial": serial, "at": now})
    document = {
        "format": FORMAT,
        "schema": VERSION,
        "fp4tune": __version__,
        "serial": serial,
        "created": now,
        "expires": round(now + days * 86400, 3),
        "store_digest": digest,
        "advisories": found,
        "suspect_gpus": suspects,
        "generation": promote.current(events),
    }
    signed = signing.sign(document, key_file) if key_file else signing.unsigned(document)
    checked_advice(signed)  # what no node would take is not published
    target = Place(out)
    try:
        target.write((json.dumps(signed, indent=1) + "\n").encode())
    except OSError as error:
        raise translate(error, out) from error
    if new:
        promote.record(place, {"advisories": [a["id"] for a in new], "at": now})
    return signed


def _advisory(warehouse: Warehouse, build: dict[str, Any]) -> dict[str, Any]:
    where = build["arch"], build["backend"], build["fingerprint"]
    kinds = warehouse.rows(_KINDS, build["arch"], build["gpu"], *where[1:])
    seen = build["seen"]
    worst = max(seen, key=lambda s: s["nodes_failing"])
    share, _ = statistics.interval(worst["gpus_failing"], worst["gpus"])
    name = "/".join(str(build[n]) for n in report.COHORT)
    kind = max(kinds, key=lambda k: k["findings"], default=None)
    return {
        "id": hashlib.sha256(name.encode()).hexdigest()[:16],
        "backend": build["backend"],
        "arch": build["arch"],
        "gpu": build["gpu"],
        "fingerprint": build["fingerprint"],
        "code": build["code"],
        "classes": [
            {"kind": k["kind"], "regime": k["regime"], "data": k["data"], "nodes": k["nodes"]}
            for k in kinds
        ],
        "profiles": [r["profile"] for r in warehouse.rows(_PROFILES, *where)],
        "evidence": seen,
        "choices_lost_nodes": warehouse.rows(_LOST, *where, build["code"])[0]["nodes"],
        "text": (
            f"{build['backend']} on {build['gpu']}: {kind['kind'] if kind else 'failures'} in "
            f"{worst['regime']} / {worst['data']} on {worst['gpus_failing']} of {worst['gpus']} "
            f"GPUs of {worst['nodes_failing']} failing nodes (at least {share:.1%} of GPUs at "
            f"95 %), alike on all: suspect this build"
        ),
    }
