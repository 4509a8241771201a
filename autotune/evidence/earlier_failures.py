"""Failures of earlier runs that still count: a run that was lucky does not undo them.

A fault that shows once in a thousand launches is missed by most runs, so a backend that failed in
an environment is unsafe in it, whatever a later run of other problems shows; until ``--again``
measures all anew, or the environment changes. That holds of layers that a run did not come to the
end of, too, and of what is left of a run that is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...cache.ledger import Ledger
from ...cache.rows import Evidence, LayerKey, Where
from ..plan import Plan
from ..steps import BEGUN
from .method import REVOKED

_Place = tuple[str, LayerKey]
"""A backend, and a layer."""


@dataclass(slots=True)
class _Account:
    """The runs whose failures in a place count, each with the regimes that were in doubt then.

    `since` is the run that last measured all of it anew, None for none.
    """

    doubts: dict[str, set[str]] = field(default_factory=dict)
    since: str | None = None


def earlier(
    plan: Plan, ledger: Ledger, fingerprints: Mapping[str, str], run: str
) -> dict[Where, list[Evidence]]:
    """Evidence with the status ``failed`` of runs before `run`, by what it is of.

    It counts where the device and the backend's fingerprint (`fingerprints`, by backend) are those
    of `plan`, and the controls of its regime were right; whatever has changed in the code that took
    it, unless that is `REVOKED`. Where a damaged run does not say any more how it was taken, it
    counts.
    """
    found: dict[Where, list[Evidence]] = {}
    if plan.again:
        return found
    accounts = _finished(plan, ledger)
    _unfinished(plan, ledger, accounts)
    others = {each.id for each in ledger.runs() if each.device != plan.device}
    for backend, print_ in fingerprints.items():
        for row in ledger.evidence(backend=backend, fingerprints=[print_], status="failed"):
            account = accounts.get((backend, row.bucket.layer), _Account())
            doubts = account.doubts.get(row.run)
            if doubts is None and row.run not in others and ledger.damaged(row.run):
                doubts = (
                    set()
                    if row.id and row.id > _first_row_since(ledger, account, backend)
                    else None
                )
            if row.run != run and doubts is not None and row.regime not in doubts:
                found.setdefault(row.where, []).append(row)
    return found


def reasons(rows: Sequence[Evidence]) -> tuple[str, ...]:
    """In which runs these failures were."""
    return tuple(f"failed in run {run}" for run in sorted({row.run for row in rows}))


def _finished(plan: Plan, ledger: Ledger) -> dict[_Place, _Account]:
    """By backend and layer, of layers that were probed to their end."""
    found: dict[_Place, _Account] = {}
    for row in ledger.probed():
        if row.device != plan.device:
            continue
        for name, known in row.detail["entrants"].items():
            if REVOKED.keys() & {row.method, known.get("method")}:
                continue
            place = (name, row.bucket.layer)
            if row.detail.get("again"):
                found[place] = _Account(since=row.run)
            account = found.setdefault(place, _Account())
            for each in known["runs"]:
                account.doubts.setdefault(each, set()).update(known["doubts"])
    return found


def _unfinished(plan: Plan, ledger: Ledger, accounts: dict[_Place, _Account]) -> None:
    """Add the runs that only began a layer, unless all of it was measured anew since."""
    begun = [row for row in ledger.steps() if row.what == BEGUN]
    newest = {(row.backend, row.bucket.layer, row.run): row.id or 0 for row in begun}
    for row in begun:
        how, place = row.detail, (row.backend, row.bucket.layer)
        if how["device"] != plan.device or how.get("method") in REVOKED:
            continue
        account = accounts.setdefault(place, _Account())
        if (row.id or 0) >= newest.get((*place, account.since or ""), 0):
            account.doubts.setdefault(row.run, set()).update(how["doubts"])


def _first_row_since(ledger: Ledger, account: _Account, backend: str) -> int:
    """The first row of the run that measured all anew, 0 where none did."""
    if account.since is None:
        return 0
    rows = ledger.evidence(run=account.since, backend=backend)
    return min((row.id or 0 for row in rows), default=0)
