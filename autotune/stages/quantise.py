"""Quantisers in a probe: each in a process of its own, its evidence under its own name.

A quantiser has no verdict and is never chosen; what it does wrong is a finding, which says why the
W4A4 backends that an engine feeds with it would fail.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ...cache.ledger import Ledger
from ...cache.rows import BucketKey, Environment, Under, Where
from ...probes import quantisers
from ...probes.problem import Problem
from ...probes.worker.supervisor import WorkerFailed
from ..environment import environment_of
from ..evidence.recorder import Recorder
from ..history import History
from ..plan import Plan
from ..probed import probed_quantiser
from ..race import Race, run_races
from ..runner import Progress, Runner
from ..verdict.buckets import ranges, representative

REGIME = "quantiser"
TACTIC = "default"


@dataclass(slots=True)
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
                bucket = bucket_of(problem)
                known = history.quantised(bucket, name, environment.fingerprint)
                if known is not None:
                    record.recall((), *known)
                    continue
                since = time.time()
                _quantise_one(runner, problem, plan.seed, record)
                ledger.add_probed(probed_quantiser(plan, name, bucket, record, since))
    record.take_facts()  # they are evidence, and no bucket's verdict rests on them
    return found


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
            _time_quantisers(problem, able, plan.level.samples, plan.seed, record)


def _time_quantisers(
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
            record.timing(Where(name, TACTIC, bucket), race.levelled(name), None, {})
    for runner in opened.values():
        with suppress(WorkerFailed):
            runner.ask("close")


def bucket_of(problem: Problem) -> BucketKey:
    """Where a quantiser's evidence is kept: a GEMM's bucket without an n."""
    most = max(quantisers.ROWS)
    return BucketKey(problem.format, "fp4", problem.out_dtype, 1, 1, most, 0, problem.k)


def _quantise_one(runner: Runner, problem: Problem, seed: int, record: Recorder) -> None:
    where = Where(runner.name, TACTIC, bucket_of(problem))
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
