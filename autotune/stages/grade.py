"""Grading: every tactic of a backend on exact, realistic and extreme data, launched serially."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor

from ...cache.rows import Under
from ...probes.data import families
from ...probes.grouped.families import grouped_families
from ...probes.regimes import ASIDE
from ...probes.regimes.mlp.layers import second_shape
from ...probes.worker.supervisor import WorkerFailed
from .. import census, steps
from ..evidence.recorder import Recorder
from ..layer import SPARE_ROWS, Entrant, ProbedLayer
from ..retest import try_again
from ..verdict.buckets import MRange

MOST_SPLITS = 5
"""How often a crash while grading is narrowed down by halves before the rest is given up."""
SERIAL = Under("serial")

Pair = tuple[MRange, str]
"""An m range, and a tactic in it."""


def grade(
    layer: ProbedLayer,
    entrants: Sequence[Entrant],
    record: Recorder,
    say: Callable[[str], None],
    pool: Executor | None = None,
) -> list[Entrant]:
    """Open the layer in every entrant's worker and grade those that are not known; those that
    could open it.

    With `pool`, entrants are graded at once: on a GPU most of that time is the host's. Each has a
    second worker then, for the regimes in `ASIDE`.
    """
    spent = layer.clock.spent

    def learn(entrant: Entrant) -> bool:
        if (entrant.known and not entrant.winner) or not entrant.opens:
            return False  # it never came so far as to be timed
        if entrant.known and layer.timed:
            return True  # and nothing is left of it to be done here
        with spent("open", entrant.name):
            if not _open_layer(layer, entrant, record, ASIDE if pool else frozenset()):
                return False
        if entrant.known:
            return True
        with spent("grade", entrant.name):
            _exact(layer, entrant, record)
        if not entrant.reference_line:
            with spent("families", entrant.name):
                _families(layer, entrant, record)
            with spent("census", entrant.name):
                census.graded(layer, entrant, record)
        return True

    def open_aside(entrant: Entrant) -> None:
        if entrant.known or entrant.reference_line or not entrant.opens:
            return
        with spent("open aside", entrant.name):
            _open_aside(layer, entrant)

    say("grading: exact, realistic and extreme data")
    with spent("grading"):
        aside = [pool.submit(open_aside, entrant) for entrant in entrants] if pool else []
        graded = list(pool.map(learn, entrants) if pool else map(learn, entrants))
        for each in aside:
            each.result()  # what it would still load disturbs clocks
    return [entrant for entrant, ok in zip(entrants, graded, strict=True) if ok]


def _open_layer(
    layer: ProbedLayer, entrant: Entrant, record: Recorder, aside: Collection[str]
) -> bool:
    """Have the entrant's worker open the layer, for regimes other than `aside`; whether it
    could."""
    try:
        pool = layer.problem.at(layer.problem.m + SPARE_ROWS)
        behind = second_shape(layer.problem) if layer.begins_mlp else None
        regimes = (
            () if entrant.reference_line else tuple(n for n in layer.regimes if n not in aside)
        )
        entrant.runner.open(pool, layer.seed, layer.memory, behind, regimes)
    except WorkerFailed as failure:
        firsts = [(m, tactics[0]) for m, tactics in entrant.tactics.items()]
        with layer.step(entrant, steps.OPEN, firsts, record):
            for m, tactic in firsts:
                record.failure(layer.where(entrant, m, tactic), SERIAL, failure)
        return False
    return True


def _open_aside(layer: ProbedLayer, entrant: Entrant) -> None:
    """Have a second worker of the backend open the layer; where it cannot, the first does all."""
    runner = entrant.runner.second()
    try:
        pool = layer.problem.at(layer.problem.m + SPARE_ROWS)
        regimes = tuple(n for n in layer.regimes if n in ASIDE)
        runner.open(pool, layer.seed, layer.memory, regimes=regimes)
    except WorkerFailed:
        return
    entrant.aside = runner


def _exact(layer: ProbedLayer, entrant: Entrant, record: Recorder) -> None:
    """Serial launches of exact problems for every tactic; the width of those that are right."""
    splits = [MOST_SPLITS]

    def halve(part: Sequence[Pair]) -> None:
        items = [layer.item(m, tactic, tag="grade") for m, tactic in part]
        try:
            results = entrant.runner.ask("grade", items=items)
        except WorkerFailed as failure:
            if failure.fatal and len(part) > 1 and splits[0] > 0:
                splits[0] -= 1
                half = len(part) // 2
                halve(part[:half])
                halve(part[half:])
                return
            question = layer.asked("grade", items=items)
            with layer.step(entrant, steps.GRADED, part, record):
                for m, tactic in part:
                    record.failure(layer.where(entrant, m, tactic), SERIAL, failure, question)
            return
        places = [layer.where(entrant, m, tactic) for m, tactic in part]
        try_again(entrant, places, SERIAL, results, record)
        with layer.step(entrant, steps.GRADED, part, record):
            for pair, where, result in zip(part, places, results, strict=True):
                width = result["width"]
                if width is not None:
                    entrant.width[pair] = width
                record.result(where, SERIAL, result, width)

    every = [(m, tactic) for m, tactics in entrant.tactics.items() for tactic in tactics]
    if left := entrant.left(steps.GRADED, every):
        halve(left)


def _families(layer: ProbedLayer, entrant: Entrant, record: Recorder) -> None:
    """Realistic and extreme data, in the serial regime, for every tactic that was graded."""
    problem = layer.problem
    every = families(problem) if problem.groups == 1 else grouped_families(problem)
    for family in every:
        step = steps.family(family.name)
        pairs = entrant.left(step, entrant.width)
        if not pairs:
            continue
        places = [layer.where(entrant, m, tactic) for m, tactic in pairs]
        under = Under("serial", family.name)
        items = [layer.item(m, t, entrant.width[m, t], family.name) for m, t in pairs]
        try:
            results = entrant.runner.ask("family", name=family.name, items=items)
        except WorkerFailed as failure:
            question = layer.asked("family", name=family.name, items=items)
            with layer.step(entrant, step, pairs, record):
                for where in places:
                    record.failure(where, under, failure, question)
                if failure.kind != "not applicable":
                    entrant.faulty.update(pairs)
            continue
        try_again(entrant, places, under, results, record)
        with layer.step(entrant, step, pairs, record):
            for pair, where, result in zip(pairs, places, results, strict=True):
                status = record.result(where, under, result, entrant.width[pair])
                if status == "failed" and family.condition is None:
                    entrant.faulty.add(pair)
