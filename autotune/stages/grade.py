"""Grading: every tactic of a backend on exact, realistic and extreme data, launched serially."""

from __future__ import annotations

from collections.abc import Sequence

from ...probes.data import families
from ...probes.regimes.mlp.layers import second_shape
from ...probes.worker.supervisor import WorkerFailed
from ..entrants import SPARE_ROWS, Entrant, Layer, asked, failed, try_again
from ..evidence.recorder import Recorder
from ..verdict.buckets import MRange
from ..verdict.rules import EXACT

MOST_SPLITS = 5
"""How often a crash while grading is narrowed down by halves before the rest is given up."""


def open_layer(layer: Layer, entrant: Entrant, record: Recorder) -> bool:
    """Have the entrant's worker open the layer; whether it could."""
    try:
        pool = layer.problem.at(layer.problem.m + SPARE_ROWS)
        behind = second_shape(layer.problem) if layer.begins_mlp else None
        regimes = () if entrant.reference_line else tuple(layer.regimes)
        entrant.runner.open(pool, layer.seed, layer.memory, behind, regimes)
    except WorkerFailed as failure:
        for m in entrant.tactics:
            failed(layer, entrant, m, entrant.tactics[m][0], "serial", EXACT, failure, record)
        return False
    return True


def grade(layer: Layer, entrant: Entrant, record: Recorder) -> None:
    """Serial launches of exact problems for every tactic; the width of those that are right."""
    pairs = [(m, tactic) for m, tactics in entrant.tactics.items() for tactic in tactics]
    splits = [MOST_SPLITS]

    def halve(part: Sequence[tuple[MRange, str]]) -> None:
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
            question = asked(layer, "grade", items=items)
            for m, tactic in part:
                failed(layer, entrant, m, tactic, "serial", EXACT, failure, record, question)
            return
        try_again(layer, entrant, part, "serial", EXACT, results, record)
        for (m, tactic), result in zip(part, results, strict=True):
            width = result["width"]
            if width is not None:
                entrant.width[m, tactic] = width
            record.result(entrant.name, tactic, layer.bucket(m), "serial", EXACT, result, width)

    halve(pairs)


def check_families(layer: Layer, entrant: Entrant, record: Recorder) -> None:
    """Realistic and extreme data, in the serial regime, for every tactic that was graded."""
    pairs = list(entrant.width)
    for family in families(layer.problem) if pairs else ():
        name = family.name
        items = [layer.item(m, t, entrant.width[m, t], name) for m, t in pairs]
        try:
            results = entrant.runner.ask("family", name=name, items=items)
        except WorkerFailed as failure:
            question = asked(layer, "family", name=name, items=items)
            for m, tactic in pairs:
                failed(layer, entrant, m, tactic, "serial", name, failure, record, question)
            entrant.faulty.update(pairs)
            continue
        try_again(layer, entrant, pairs, "serial", name, results, record)
        for pair, item, result in zip(pairs, items, results, strict=True):
            status = record.result(
                entrant.name, pair[1], layer.bucket(pair[0]), "serial", name, result, item["width"]
            )
            if status == "failed" and family.condition is None:
                entrant.faulty.add(pair)
