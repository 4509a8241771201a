"""Timing quantisers: what a W4A4 layer takes beside its GEMM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

from ...cache.rows import Environment
from ...probes import quantisers
from ...probes.problem import Problem
from ...probes.worker.supervisor import WorkerFailed
from ..evidence.recorder import Recorder
from ..keys import quantiser_place
from ..plan import Plan
from ..race import Race, run_races
from ..runner import Progress, Runner
from ..verdict.buckets import ranges, representative


def time_quantisers(
    environments: Sequence[Environment], plan: Plan, record: Recorder, progress: Progress
) -> None:
    """Time the quantisers of these `environments` that came out right, side by side, for every
    (format, dtype, k) and range of m of the W4A4 problems.

    One that does not finish gets no time: what it did wrong is found when it is probed.
    """
    wrong = {row.where for row in record.findings}
    found = [quantiser for e in environments if (quantiser := quantisers.find(e.backend))]
    formats = {quantiser.name: quantiser.format for quantiser in found}
    mine = sorted((p for p in plan.problems if p.activation == "fp4"), key=lambda p: p.m)
    unique = {(p.format, p.out_dtype, p.k): p for p in mine}
    with ExitStack() as stack:
        runners = {
            name: Runner(name, plan.target, plan.patience, plan.python, progress)
            for name in formats
        }
        for runner in runners.values():
            stack.callback(runner.close)
        for problem in unique.values():
            able = {
                name: runner
                for name, runner in runners.items()
                if formats[name] == problem.format and quantiser_place(name, problem) not in wrong
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
        for name in race.samples:
            record.timing(quantiser_place(name, problem, m), race.levelled(name), None, {})
    for runner in opened.values():
        with suppress(WorkerFailed):
            runner.ask("close")
