"""Quantisers in a probe: each in a process of its own, its evidence under its own name.

A quantiser has no verdict and is never chosen; what it does wrong is a finding, which says why the
W4A4 backends that an engine feeds with it would fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from ...cache.ledger import Ledger
from ...cache.rows import BucketKey, Environment
from ...machine.devices import Target
from ...probes import quantisers
from ...probes.problem import Problem
from ...probes.worker.supervisor import WorkerFailed
from ..evidence.recorder import Recorder
from ..plan import Plan
from ..runner import Patience, Progress, Runner
from ..verdict.buckets import ranges, representative
from .race import Race
from .timing import run_races

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
    known: Callable[[str, str, BucketKey], bool] = lambda name, print_, bucket: False,
    done: Callable[[str, str, BucketKey, float], None] = lambda name, print_, bucket, at: None,
) -> tuple[list[Environment], dict[str, str], dict[str, str]]:
    """Probe quantisers for every (format, dtype, k) of the W4A4 `problems`.

    Returns the environments met, and by name why a quantiser cannot run here, or how it broke.
    `known` says whether one, by name, fingerprint and bucket, need not be probed; `done` is told of
    each that was, and since when.
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
                place = name, found.fingerprint, bucket_of(problem)
                if not known(*place):
                    at = time.time()
                    _one(runner, problem, seed, record, patience)
                    done(*place, at)
    record.take_facts()  # they are evidence, and no bucket's verdict rests on them
    return met, unsupported, broken


def time_quantisers(
    environments: Sequence[Environment], plan: Plan, record: Recorder, progress: Progress
) -> None:
    """Time the quantisers of these `environments` that came out right, side by side, for every
    (format, dtype, k) and range of m of the W4A4 problems.

    One that does not finish gets no time: what it did wrong was for `probe_quantisers` to find.
    """
    wrong = {(row.backend, row.bucket) for row in record.findings}
    found = [quantiser for e in environments if (quantiser := quantisers.find(e.backend))]
    formats = {quantiser.name: quantiser.format for quantiser in found}
    unique = {
        bucket_of(p): p for p in sorted(plan.problems, key=lambda p: p.m) if p.activation == "fp4"
    }
    with ExitStack() as stack:
        runners = {
            name: Runner(name, plan.target, plan.patience, plan.python, progress)
            for name in formats
        }
        for runner in runners.values():
            stack.callback(runner.close)
        for place, problem in unique.items():
            able = {
                name: runner
                for name, runner in runners.items()
                if (name, place) not in wrong and formats[name] == problem.format
            }
            _time(problem, able, plan.level.samples, plan.seed, record)


def _time(
    problem: Problem, runners: Mapping[str, Runner], rounds: int, seed: int, record: Recorder
) -> None:
    wanted = [m for m in ranges(problem.m) if m.hi]
    ms = [representative(m) for m in wanted]
    opened: dict[str, Runner] = {}
    for name, runner in runners.items():
        with suppress(WorkerFailed):
            # It may have to be compiled again, by a process that is new.
            silence = runner.patience.build
            wants = {"dtype": problem.out_dtype, "k": problem.k, "ms": ms, "seed": seed}
            runner.ask("open_quantiser_timing", silence, **wants)
            opened[name] = runner
    races = {m: Race(tuple(opened), rounds) for m in wanted}
    places = {(m, name): (name, i) for i, m in enumerate(wanted) for name in opened}

    def ask(name: str, indices: list[int]) -> list[float] | None:
        try:
            found: list[float] = opened[name].ask("sample", indices=indices)
        except WorkerFailed:
            return None
        return found

    run_races(races, places, ask)
    for m, race in races.items():
        bucket = replace(bucket_of(problem), m_lo=m.lo, m_hi=m.hi)
        for name in race.samples:
            record.timing(name, TACTIC, bucket, race.levelled(name), None, {})
    for runner in opened.values():
        with suppress(WorkerFailed):
            runner.ask("close")


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
