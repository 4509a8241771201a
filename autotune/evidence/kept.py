"""What a run that ended on a full disk leaves, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...cache.errors import Full, StateError
from ...cache.ledger import Ledger


def with_what_is_kept(error: Full, state_dir: Path, runs: Sequence[str]) -> Full:
    """`error` of these runs, with how many of their rows are in the ledger all the same."""
    try:
        with Ledger.open(state_dir, readonly=True) as ledger:
            rows = sum(
                len(of(run=run))
                for run in runs
                for of in (ledger.evidence, ledger.findings, ledger.timings, ledger.verdicts)
            )
            layers = len({row.bucket.layer for row in ledger.probed() if row.run in runs})
    except StateError:
        return error
    sentence = (
        f"the disk is full: {rows} row{'' if rows == 1 else 's'} of this probe's evidence "
        f"{'is' if rows == 1 else 'are'} kept, {layers} of its layers to their end, and what was "
        "published before stays; make room and probe again, which goes on from there"
    )
    return Full(error.path, sentence)
