"""Failures of earlier runs that still count: a run that was lucky does not undo them.

A fault that shows once in a thousand launches is missed by most runs, so a backend that failed in
an environment is unsafe in it, whatever a later run of other problems shows; until ``--again``
measures all anew, or the environment changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...cache.ledger import Ledger
from ...cache.rows import Evidence, LayerKey, Where
from ..plan import Plan
from .method import REVOKED


def earlier(
    plan: Plan, ledger: Ledger, fingerprints: Mapping[str, str], run: str
) -> dict[Where, list[Evidence]]:
    """Evidence with the status ``failed`` of runs before `run`, by what it is of.

    It counts where the device and the backend's fingerprint (`fingerprints`, by backend) are those
    of `plan`, its layer was probed to the end, and the controls of its regime were right; whatever
    has changed in the code that took it, unless that is `REVOKED`.
    """
    found: dict[Where, list[Evidence]] = {}
    for (backend, layer), (runs, doubts) in _runs(plan, ledger, run).items():
        prints = [fingerprints[backend]] if backend in fingerprints else []
        for each in runs if prints else ():
            for row in ledger.evidence(run=each, backend=backend, fingerprints=prints):
                counts = row.status == "failed" and row.regime not in doubts[each]
                if counts and row.bucket.layer == layer:
                    found.setdefault(row.where, []).append(row)
    return found


def reasons(rows: Sequence[Evidence]) -> tuple[str, ...]:
    """In which runs these failures were."""
    return tuple(f"failed in run {run}" for run in sorted({row.run for row in rows}))


def _runs(
    plan: Plan, ledger: Ledger, run: str
) -> dict[tuple[str, LayerKey], tuple[list[str], dict[str, set[str]]]]:
    """By backend and layer: the runs that count, and of each the regimes that were in doubt."""
    found: dict[tuple[str, LayerKey], tuple[list[str], dict[str, set[str]]]] = {}
    if plan.again:
        return found
    mine = plan.device
    for row in ledger.probed():
        if row.device != mine:
            continue
        for name, known in row.detail["entrants"].items():
            if REVOKED.keys() & {row.method, known.get("method")}:
                continue
            place = (name, row.bucket.layer)
            if row.detail.get("again"):
                found.pop(place, None)
            runs, doubts = found.setdefault(place, ([], {}))
            for each in known["runs"]:
                if each != run and each not in runs:
                    runs.append(each)
                doubts.setdefault(each, set()).update(known["doubts"])
    return found
