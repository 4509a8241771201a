"""What backends say of themselves and of problems, asked in processes that may die or hang.

Backends from elsewhere, a file's or an installed package's, have a process each. Ours share one,
and are asked one after another: where it dies, the one that was being asked is to blame, and
another process asks the rest. All processes work at once, so a backend that hangs while it is
imported delays nobody else by more than its own limit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from ..machine.devices import Target
from ..probes import registry
from ..probes.problem import Problem
from ..probes.worker.supervisor import Worker, WorkerFailed
from .runner import Patience

Answer = dict[str, Any]

_START = Patience(0).start


def survey(
    target: Target,
    backends: Sequence[str],
    problems: Sequence[Problem],
    python: str | None = None,
    hang_seconds: float | None = None,
) -> dict[str, Answer]:
    """What each backend is and which problems it supports, by the name it was asked for.

    A value holds ``name``, ``activation``, ``layout``, ``reference_line`` and ``reasons`` (None
    where supported), or ``error``. `hang_seconds` is how long a backend may take to be imported
    and asked; by default as long as one may take to start.
    """
    asked = [asdict(problem) for problem in problems]
    answers: dict[str, Answer] = {}

    def one(group: tuple[str, ...]) -> dict[str, Answer]:
        # Of ours it is known that they need some seconds, and that none hangs.
        limit = _START if group == ours else hang_seconds or _START
        return _ask_of_one_process(target, group, asked, python, limit)

    ours = tuple(spec for spec in dict.fromkeys(backends) if _is_ours(spec))
    groups: list[tuple[str, ...]] = [
        (spec,) for spec in dict.fromkeys(backends) if spec not in ours
    ]
    groups += [ours] if ours else []
    # More than there are cores: one that hangs must not take another's place.
    with ThreadPoolExecutor(max(1, min(len(groups), 4 * (os.cpu_count() or 1)))) as pool:
        for found in pool.map(one, groups):
            answers.update(found)
    return {spec: answers[spec] for spec in backends}


def _is_ours(spec: str) -> bool:
    return spec in registry.BUILTIN or spec in registry.EXPERTS or spec.startswith("zoo-")


def _ask_of_one_process(
    target: Target,
    backends: Sequence[str],
    problems: Sequence[dict[str, Any]],
    python: str | None,
    silence: float,
) -> dict[str, Answer]:
    """The answers of these, in one process for as long as that lives."""
    answers: dict[str, Answer] = {}
    while left := [spec for spec in backends if spec not in answers]:
        worker = Worker(python, target.environment)
        try:
            worker.ask("ready", _START)
            for spec in left:
                answers[spec] = _survey_one(worker, target, spec, problems, silence)
                if not worker.alive:
                    break
        except WorkerFailed as failure:  # before any of them was asked
            return answers | {spec: {"error": f"{failure.kind}: {failure}"} for spec in left}
        finally:
            worker.close()
    return answers


def _survey_one(
    worker: Worker,
    target: Target,
    spec: str,
    problems: Sequence[dict[str, Any]],
    silence: float,
) -> Answer:
    device = target.device
    try:
        answer: Answer = worker.ask(
            "survey", silence, backend=spec, kind=device.kind, sm=device.sm, problems=problems
        )
        return answer
    except WorkerFailed as failure:
        return {"error": f"{failure.kind}: {failure}"}
