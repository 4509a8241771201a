"""When a probe takes the census: after grading, and once more of what was timed."""

from __future__ import annotations

from collections.abc import Sequence

from ..cache.rows import Under
from ..probes.worker.supervisor import WorkerFailed
from ..words import CENSUS
from . import steps
from .evidence.recorder import Recorder
from .layer import Entrant, ProbedLayer
from .verdict.buckets import MRange


def graded(layer: ProbedLayer, entrant: Entrant, record: Recorder) -> None:
    """The census of every graded tactic in every bucket. What it blames is beaten by any other.

    That a census does not finish says nothing of the backend, which the regimes try anyway: it is
    `skipped`, and not taken again of later layers where it took the worker down.
    """
    pairs = entrant.left(steps.CENSUS, entrant.width)
    if not pairs:
        return
    why = _cannot(layer, entrant)
    if why is None:
        items = [layer.item(m, t, entrant.width[m, t], "grade") for m, t in pairs]
        try:
            # Machine code is disassembled meanwhile.
            silence = max(entrant.runner.patience.run, 120.0)
            results = entrant.runner.ask("census", silence, items=items)
        except WorkerFailed as failure:
            why = f"the census did not finish: {failure.kind} ({failure})"
            if failure.fatal:
                entrant.dead[CENSUS] = f"{failure.kind} ({failure})"
        else:
            with layer.step(entrant, steps.CENSUS, pairs, record):
                for (m, tactic), result in zip(pairs, results, strict=True):
                    record.census(layer.where(entrant, m, tactic), result)
                    if result["bad"]:
                        entrant.faulty.add((m, tactic))
            return
    status = "not applicable" if layer.target.device.kind == "cpu" else "skipped"
    with layer.step(entrant, steps.CENSUS, pairs, record):
        for m, tactic in pairs:
            record.status(layer.where(entrant, m, tactic), Under(CENSUS), status, {"note": why})


def _cannot(layer: ProbedLayer, entrant: Entrant) -> str | None:
    if layer.target.device.kind == "cpu":
        return "a CPU launches no kernels"
    if CENSUS in entrant.dead:
        return f"not taken again: {entrant.dead[CENSUS]} on an earlier layer"
    return None


def timed(
    layer: ProbedLayer, entrant: Entrant, pairs: Sequence[tuple[MRange, str]], record: Recorder
) -> None:
    """What is being timed must have been checked: called when the last sample was taken."""
    if _cannot(layer, entrant) is not None:
        return
    try:
        silence = max(entrant.runner.patience.run, 120.0)
        found = entrant.runner.ask("census_timed", silence)
    except WorkerFailed as failure:
        if failure.fatal:
            entrant.dead[CENSUS] = f"{failure.kind} ({failure})"
        return
    for (m, tactic), bad in zip(pairs, found, strict=True):
        if bad:
            entrant.faulty.add((m, tactic))
            result = {"bad": bad, "seen": True, "detail": {"timed": True}}
            record.census(layer.where(entrant, m, tactic), result)
