"""What ``fp4tune audit`` found, kept in the ledger, and what it takes back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...cache import state
from ...cache.errors import StateError
from ...cache.ledger import Ledger
from ...probes.audit import FLAGGED, AuditReport
from ..evidence.audits import row


def remember(reports: Sequence[AuditReport], state_dir: Path | None = None) -> list[str]:
    """Write reports to a ledger, and publish what they take away; what there is to say of it.

    The ledger is that of `state_dir`, made if need be; without one, that of the place writers use,
    if there is any. An audit is worth printing where nothing can be written, so that is said and
    no error.
    """
    try:
        place = state.directory(state_dir)
        if not reports or (state_dir is None and not (Path(place) / state.LEDGER).exists()):
            return []
        rows = [row(report) for report in reports]
        with Ledger.open(place) as ledger:
            ledger.add_all(rows)
        if not any(each.verdict == FLAGGED for each in rows):
            return []
        from .publish import publish_audits  # with it comes torch, which takes seconds

        generation = publish_audits(rows, Path(place))
    except StateError as error:
        return [f"the audit was not stored: {error}"]
    if generation is None:
        return []
    return [f"choices of a flagged module were taken back; stored as generation {generation}"]
