"""Quantisers in a probe: each in a process of its own, its evidence under its own name.

A quantiser has no verdict and is never chosen; what it does wrong is a finding, which says why the
W4A4 backends that an engine feeds with it would fail.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ...cache.ledger import Ledger
from ...cache.rows import Environment, Under
from ...probes import quantisers
from ...probes.problem import Problem
from ...probes.worker.supervisor import WorkerFailed
from ..environment import environment_of
from ..evidence.recorder import Recorder
from ..history import History
from ..keys import quantiser_place
from ..plan import Plan
from ..probed import probed_quantiser
from ..runner import Progress, Runner

REGIME = "quantiser"


@dataclass(frozen=True, slots=True)
class Quantised:
    """What came of probing quantisers: environments met, and by name why one cannot run here, or
    how it broke."""

    environments: list[Environment] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def probe_quantisers(
    plan: Plan, ledger: Ledger, record: Recorder, history: History, progress: Progress
) -> Quantised:
    """Probe the plan's quantisers for every (format, dtype, k) of its W4A4 problems, those that
    `history` does not know."""
    found = Quantised()
    for name in plan.quantisers:
        quantiser = quantisers.find(name)
        if quantiser is None:
            continue
        mine = [p for p in plan.problems if (p.activation, p.format) == ("fp4", quantiser.format)]
        unique = {(p.out_dtype, p.k): p for p in mine}
        if not unique:
            continue
        # A CPU needs no process to say no; elsewhere the engine's interpreter is asked.
        device = plan.target.device
        why = quantiser.unsupported(device) if device.kind == "cpu" else None
        if why:
            found.unsupported[name] = why
            continue
        with closing(Runner(name, plan.target, plan.patience, plan.python, progress)) as runner:
            try:
                runner.start()
                why = runner.ask("quantiser_unsupported")
                if why:
                    found.unsupported[name] = why
                    continue
                environment = environment_of(runner)
            except WorkerFailed as failure:
                found.broken[name] = f"{failure.kind}: {failure}"
                continue
            found.environments.append(environment)
            ledger.add_environment(environment)
            record.knows(name, environment.fingerprint)
            for problem in unique.values():
                bucket = quantiser_place(name, problem).bucket
                known = history.quantised(bucket, name, environment.fingerprint)
                if known is not None:
                    record.recall((), *known)
                    continue
                since = time.time()
                _quantise_one(runner, problem, plan.seed, record)
                ledger.add_probed(probed_quantiser(plan, name, bucket, record, since))
    record.take_facts()  # they are evidence, and no bucket's verdict rests on them
    return found


def _quantise_one(runner: Runner, problem: Problem, seed: int, record: Recorder) -> None:
    where = quantiser_place(runner.name, problem)
    try:
        # The first call may compile for minutes.
        results: list[dict[str, Any]] = runner.ask(
            "quantise", runner.patience.build, dtype=problem.out_dtype, k=problem.k, seed=seed
        )
    except WorkerFailed as failure:
        record.failure(where, Under(REGIME, "realistic"), failure)
        return
    for result in results:
        record.result(where, Under(REGIME, result["data"]), result, None)
