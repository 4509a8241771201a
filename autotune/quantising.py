"""Quantisers in a probe: each in a process of its own, its evidence under its own name.

A quantiser has no verdict and is never chosen; what it does wrong is a finding, which says why the
W4A4 backends that an engine feeds with it would fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ..cache.ledger import Ledger
from ..cache.rows import BucketKey, Environment
from ..probes import quantisers
from ..probes.devices import Target
from ..probes.problem import Problem
from ..probes.supervisor import WorkerFailed
from .record import Recorder
from .runner import Patience, Progress, Runner

REGIME = "quantiser"
TACTIC = "default"


def probe_quantisers(
    names: Sequence[str],
    target: Target,
    problems: Sequence[Problem],
    seed: int,
    python: str | None,
    patience: Patience,
    ledger: Ledger,
    record: Recorder,
    progress: Progress,
    environment_of: Callable[[Runner, Target], Environment],
) -> tuple[list[Environment], dict[str, str], dict[str, str]]:
    """Probe quantisers for every (format, dtype, k) of the W4A4 `problems`.

    Returns the environments met, and by name why a quantiser cannot run here, or how it broke.
    """
    met: list[Environment] = []
    unsupported: dict[str, str] = {}
    broken: dict[str, str] = {}
    for name in names:
        quantiser = quantisers.find(name)
        if quantiser is None:
            continue
        mine = [p for p in problems if (p.activation, p.format) == ("fp4", quantiser.format)]
        unique = {(p.out_dtype, p.k): p for p in mine}
        if not unique:
            continue
        # A CPU needs no process to say no; elsewhere the engine's interpreter is asked.
        why = quantiser.unsupported(target.device) if target.device.kind == "cpu" else None
        if why:
            unsupported[name] = why
            continue
        with ExitStack() as stack:
            runner = Runner(name, target, patience, python, progress)
            stack.callback(runner.close)
            try:
                runner.start()
                why = runner.ask("quantiser_unsupported")
                if why:
                    unsupported[name] = why
                    continue
                found = environment_of(runner, target)
            except WorkerFailed as failure:
                broken[name] = f"{failure.kind}: {failure}"
                continue
            met.append(found)
            ledger.add_environment(found)
            record.knows(name, found.fingerprint)
            for problem in unique.values():
                _one(runner, problem, seed, record, patience)
    record.take_facts()  # they are evidence, and no bucket's verdict rests on them
    return met, unsupported, broken


def bucket_of(problem: Problem) -> BucketKey:
    """Where a quantiser's evidence is kept: a GEMM's bucket without an n."""
    most = max(quantisers.ROWS)
    return BucketKey(problem.format, "fp4", problem.out_dtype, 1, 1, most, 0, problem.k)


def _one(runner: Runner, problem: Problem, seed: int, record: Recorder, patience: Patience) -> None:
    bucket = bucket_of(problem)
    try:
        # The first call may compile for minutes.
        results: list[dict[str, Any]] = runner.ask(
            "quantise", patience.build, dtype=problem.out_dtype, k=problem.k, seed=seed
        )
    except WorkerFailed as failure:
        record.failure(runner.name, TACTIC, bucket, REGIME, "realistic", failure)
        return
    for result in results:
        record.result(runner.name, TACTIC, bucket, REGIME, result["data"], result, None)
