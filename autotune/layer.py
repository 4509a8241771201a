"""One layer's probe: grade every tactic, time the survivors side by side, then try to break them.

A layer is one (format, activation, dtype, n, k). Backends take part as *entrants*. Everything
learnt goes to the recorder as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial

from ..probes.regimes import ALONE, REGIMES
from ..probes.worker.supervisor import WorkerFailed
from . import spending
from .entrants import Entrant, Layer
from .evidence.recorder import Recorder
from .stages import census
from .stages.grade import check_families, grade, open_layer
from .stages.stress import run_regime
from .stages.timing import time_side_by_side, tune
from .verdict.buckets import MRange

__all__ = ["Entrant", "Layer", "probe_layer"]


def probe_layer(
    layer: Layer,
    entrants: Sequence[Entrant],
    record: Recorder,
    say: Callable[[str], None],
    pool: Executor | None = None,
) -> None:
    """Grade, time and stress every entrant; evidence, findings and times go to `record`.

    With `pool`, entrants are graded at once, and go through most regimes at once: on a GPU most of
    that time is the host's, and a hang of one is waited for while others go on. Timing, and the
    regimes that need it (`ALONE`), have the device to themselves.
    """

    spent = layer.clock.spent

    def learn(entrant: Entrant) -> bool:
        if entrant.known and not entrant.winner:
            return False  # it never came so far as to be timed
        with spent("open", entrant.name):
            if not open_layer(layer, entrant, record):
                return False
        if entrant.known:
            return True
        with spent("grade", entrant.name):
            grade(layer, entrant, record)
        if not entrant.reference_line:
            with spent("families", entrant.name):
                check_families(layer, entrant, record)
            with spent("census", entrant.name):
                census.graded(layer, entrant, record)
        return True

    say("grading: exact, realistic and extreme data")
    with spent("grading"):
        graded = list(pool.map(learn, entrants) if pool else map(learn, entrants))
    opened = [e for e, ok in zip(entrants, graded, strict=True) if ok]
    for entrant in (e for e in opened if not e.known):
        with spent("tactics", entrant.name):
            tune(layer, entrant, record, say)
    say("timing side by side")
    with spent("timing"):
        time_side_by_side(layer, [e for e in opened if e.winner], record)
    tried = [e for e in opened if e.winner and not e.reference_line]
    run = partial(_stress, layer, record=record, say=say, pool=pool)
    if layer.allowance is None:
        run({entrant.name: None for entrant in tried}, tried)
    else:
        spending.from_the_fastest(layer, layer.allowance, tried, run, record)
    for entrant in opened:
        # A worker that dies now has shown all it had; the next layer starts another.
        with suppress(WorkerFailed):
            entrant.runner.close_layer()


def _stress(
    layer: Layer,
    part: Mapping[str, Collection[MRange] | None],
    tried: Sequence[Entrant],
    record: Recorder,
    say: Callable[[str], None],
    pool: Executor | None,
) -> None:
    """Every regime of the level, for the entrants in `part`, in these m ranges (None: in all)."""
    spent = layer.clock.spent
    mine = [entrant for entrant in tried if entrant.name in part and not entrant.known]

    def stress(entrant: Entrant, regimes: Sequence[str]) -> None:
        for regime in (name for name in regimes if name not in layer.level.without):
            say(f"{regime}: {entrant.name}")
            with spent(regime, entrant.name):
                run_regime(layer, entrant, regime, record, part[entrant.name])

    with spent("regimes, one at a time"):
        for regime in (name for name in REGIMES if name in ALONE):
            for entrant in mine:
                stress(entrant, [regime])
    together = partial(stress, regimes=[name for name in REGIMES if name not in ALONE])
    with spent("regimes, side by side"):
        list(pool.map(together, mine) if pool else map(together, mine))
