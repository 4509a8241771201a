"""The race against an oracle: what its choices cost, how long it takes, whether it repeats itself.

    python benchmarks/regret.py --out DIR [--seconds 330] [--repeats 10] [--preset NAME ...]

For every (m, n, k): the race of a probe at level standard, among all tactics of all backends that
came out right in one pass of grading, again and again (copies of the weight, graphs and samples are
new each time, processes and data are not); and an oracle, which samples every candidate in turn
until its 95 % interval has a half-width of 0.5 %. Into DIR after each repeat: regret.json,
regret.txt and regret.svg. With `--with DIR` the repeats of an earlier run of the same problems,
whose processes were others, count, too.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

from _machine import versions
from _regret_report import report

from fp4tune.autotune import request as planning
from fp4tune.autotune.asking import survey
from fp4tune.autotune.choice.rank import ranked, time_of
from fp4tune.autotune.environment import environment_of
from fp4tune.autotune.evidence.recorder import Recorder
from fp4tune.autotune.layer import Entrant, ProbedLayer
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.runner import Patience, Runner
from fp4tune.autotune.stages.grade import grade
from fp4tune.autotune.stages.timing import time_layer
from fp4tune.autotune.verdict.buckets import MRange, bucket_of, representatives
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.autotune.verdict.statistics import mean_interval
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Candidate
from fp4tune.machine import devices
from fp4tune.machine.memory import free_memory
from fp4tune.probes import registry
from fp4tune.probes.problem import Problem
from fp4tune.probes.worker.supervisor import WorkerFailed
from fp4tune.words import CENSUS

LEVEL = LEVELS["standard"]
M = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
PRESETS = ("llama-3.1-8b", "qwen3-8b")
HALF_WIDTH = 0.005
FEWEST, MOST = 8, 80
"""Samples of the oracle for each candidate: at least, so that an interval is one, and at most."""
AT_ONCE = 4
Key = tuple[MRange, str, str]
"""An m range, a backend and its tactic."""


class Bench:
    """The backends that can run here, built for all layers."""

    def __init__(self, target: devices.Target, names: Sequence[str], problems: Sequence[Problem]):
        self.target, self.problems = target, problems
        self.runners: dict[str, Runner] = {}
        self.unable: dict[str, str] = {}
        answers = survey(target, names, problems)
        for name in names:
            answer = answers[name]
            why = answer.get("error") or next((r for r in answer["reasons"] if r), None)
            if why:
                self.unable[name] = why
                continue
            patience = Patience(120.0)
            runner = Runner(name, target, patience, None, lambda *_: None, hello=answer)
            self.runners[runner.name] = runner

    def build(self, ranges: Sequence[MRange], pool: ThreadPoolExecutor) -> float:
        """Compile for all problems at every range; wall seconds. One that fails takes no part."""
        start = time.monotonic()
        wanted = [p.at(m.hi) for p in self.problems for m in ranges]
        workers = max(1, len(os.sched_getaffinity(0)) // max(1, min(2, len(self.runners))))
        jobs = {name: pool.submit(r.build, wanted, workers) for name, r in self.runners.items()}
        for name, job in jobs.items():
            try:
                print(f"  built {name} in {job.result():.1f} s", flush=True)
            except WorkerFailed as failure:
                self.unable[name] = f"{failure.kind} while building: {failure}"
                self.runners.pop(name).close()
        return time.monotonic() - start

    def layer(self, problem: Problem, ranges: Sequence[MRange], seed: int) -> ProbedLayer:
        seen = next(iter(self.runners.values())).hello["device"]
        memory = int(0.3 * seen.get("free", free_memory()) / len(self.runners))
        cache = int(seen.get("l2_bytes", 32 << 20))
        return ProbedLayer(self.target, problem, tuple(ranges), LEVEL, seed, memory, cache)

    def entrants(self, layer: ProbedLayer) -> list[Entrant]:
        found = []
        problems = [layer.problem.at(m.hi) for m in layer.ranges]
        for runner in self.runners.values():
            tactics = dict(zip(layer.ranges, runner.tactics(problems), strict=True))
            line = bool(runner.hello.get("reference_line"))
            # No census: nothing here is judged by it.
            dead = {CENSUS: "left out of this benchmark"}
            found.append(Entrant(runner, tactics, line, dead))
        return found


def race(layer: ProbedLayer, entrants: Sequence[Entrant], record: Recorder) -> dict[MRange, Key]:
    """One race: what it would choose in each range, all that is right being safe."""
    for each in entrants:
        each.winner, each.median_us = {}, {}
    time_layer(layer, entrants, record, lambda text: None)
    chosen = {}
    for m in layer.ranges:
        able = [e for e in entrants if m in e.median_us and not e.reference_line]
        rows = [candidate(layer, e, m) for e in able]
        order = ranked(rows, {row.backend: time_of(row) for row in rows})
        if order:
            tactic = next(row.tactic for row in rows if row.backend == order[0])
            chosen[m] = (m, order[0], tactic)
    return chosen


def candidate(layer: ProbedLayer, e: Entrant, m: MRange) -> Candidate:
    target = layer.target
    head = (target.device.arch, target.name, "strict", layer.bucket(m), e.name, e.winner[m])
    return Candidate(*head, e.runner.hello["layout"], "safe", median_us=e.median_us[m])


def oracle(
    layer: ProbedLayer, entrants: Sequence[Entrant], until: float
) -> dict[Key, dict[str, Any]]:
    """Every candidate's time: the geometric mean of its samples, and how well it is known. After
    `until` (of `time.monotonic`) no more is taken than the fewest samples."""
    by_name = {e.name: e for e in entrants}
    places: dict[Key, int] = {}
    for e in entrants:
        pairs = [(m, t) for m in layer.ranges for t in e.right_tactics(m)]
        if pairs:
            items = [{"ms": representatives(m), "tactic": t} for m, t in pairs]
            e.runner.ask("open_timing", items=items, cache_bytes=layer.cache_bytes)
        places.update({(m, e.name, t): index for index, (m, t) in enumerate(pairs)})
    logs: dict[Key, list[float]] = {key: [] for key in places}
    turn = 0
    while left := [key for key, taken in logs.items() if not enough(taken)]:
        if turn >= FEWEST and time.monotonic() > until:
            break
        step = -1 if turn % 2 else 1
        for start in range(0, len(layer.ranges), AT_ONCE):
            group = layer.ranges[start : start + AT_ONCE]
            for name in list(by_name)[::step]:
                mine = [key for key in left if key[1] == name and key[0] in group][::step]
                if not mine:
                    continue
                asked = [places[key] for key in mine]
                for key, us in zip(
                    mine, by_name[name].runner.ask("sample", indices=asked), strict=True
                ):
                    logs[key].append(log(us))
        turn += 1
    for e in entrants:
        e.runner.ask("close_timing")
    return {
        key: {"us": exp(fmean(taken)), "half_width": half_width(taken), "samples": len(taken)}
        for key, taken in logs.items()
    }


def half_width(taken: Sequence[float]) -> float:
    low, high = mean_interval(taken, 0.95)
    return (high - low) / 2


def enough(taken: Sequence[float]) -> bool:
    if len(taken) < FEWEST:
        return False
    return len(taken) >= MOST or half_width(taken) <= HALF_WIDTH


def one_layer(
    bench: Bench,
    problem: Problem,
    ranges: Sequence[MRange],
    arguments: argparse.Namespace,
    until: float,
    record: Recorder,
    keep: Callable[[list[dict[str, Any]]], None],
    pool: ThreadPoolExecutor,
) -> None:
    """Grade, one race, the oracle, then more races while there is time; `keep` after each."""
    layer = bench.layer(problem, ranges, arguments.seed)
    entrants = bench.entrants(layer)
    graded = grade(layer, entrants, record, lambda text: None, pool)
    entered = [e for e in graded if e.width]
    repeats: list[dict[MRange, Key]] = []
    seconds: list[float] = []
    truth: dict[Key, dict[str, Any]] = {}
    took = 0.0
    lines = {e.name for e in entered if e.reference_line}
    for number in range(arguments.repeats):
        if number and time.monotonic() + seconds[-1] > until:
            break
        start = time.monotonic()
        repeats.append(race(layer, entered, record))
        seconds.append(round(time.monotonic() - start, 3))
        if not truth:
            start = time.monotonic()
            truth = oracle(layer, entered, until)
            took = round(time.monotonic() - start, 3)
        keep(
            [
                {
                    **{"m": m.hi, "n": problem.n, "k": problem.k, "format": problem.format},
                    "candidates": [
                        {"backend": b, "tactic": t, "line": b in lines, **truth[r, b, t]}
                        for r, b, t in truth
                        if r == m
                    ],
                    "choices": [list(each[m][1:]) for each in repeats if m in each],
                    "race_seconds": [round(s / len(ranges), 4) for s in seconds],
                    "oracle_seconds": round(took / len(ranges), 4),
                }
                for m in ranges
            ]
        )
        print(f"  repeat {number + 1}: {seconds[-1]:.1f} s (oracle {took:.1f} s)", flush=True)
    for e in entrants:
        e.runner.close_layer()


def kept(
    document: dict[str, Any],
    earlier: Sequence[dict[str, Any]],
    out: Path,
    began: float,
    done: Sequence[dict[str, Any]],
    new: Sequence[dict[str, Any]],
) -> None:
    """Write what there is: the layers `done`, and the `new` rows of the one in work."""
    document["problems"] = [*done, *new]
    document["seconds"] = round(time.monotonic() - began, 1)
    report(document, earlier, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=330.0, help="wall time, builds included")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--preset", action="append")
    parser.add_argument("--shape", action="append", default=[], help="N,K; instead of presets")
    parser.add_argument("--m", type=int, action="append", help="edges of m ranges; repeatable")
    parser.add_argument("--most-layers", type=int, default=5)
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--backend", action="append")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpu", default=None)
    parser.add_argument("--with", dest="earlier", type=Path, action="append", default=[])
    arguments = parser.parse_args()
    began = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (target, *_) = devices.select(arguments.gpu)
    presets = arguments.preset or ([] if arguments.shape else PRESETS)
    found = planning.layers(presets, None, arguments.shape, 1, target.device.kind)
    ranges = sorted({bucket_of(m) for m in arguments.m or M})
    problems = [
        Problem(arguments.format, ranges[-1].hi, each.n, each.k)
        for each in found[: arguments.most_layers]
    ]
    names = planning.backends(arguments.backend or registry.names())
    document: dict[str, Any] = {
        "device": target.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(),
        "level": LEVEL.name,
        "most_samples": LEVEL.samples,
        "oracle": {"half_width": HALF_WIDTH, "confidence": 0.95, "fewest": FEWEST, "most": MOST},
        "repeats_asked": arguments.repeats,
        "problems": [],
    }
    earlier = [json.loads((place / "regret.json").read_text()) for place in arguments.earlier]
    bench = Bench(target, names, problems)
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(16) as pool:
        try:
            document["build_seconds"] = round(bench.build(ranges, pool), 1)
            document["unable"] = bench.unable
            with Ledger.open(Path(place)) as ledger:
                run = ledger.start_run(
                    seed=arguments.seed, level=LEVEL.name, profile=PROFILES["strict"].name,
                    device={"name": target.name, "uuid": target.uuid}, argv=(),
                )  # fmt: skip
                record = Recorder(ledger, run, arguments.seed)
                for name, runner in bench.runners.items():
                    environment = environment_of(runner)
                    ledger.add_environment(environment)
                    record.knows(name, environment.fingerprint)
                done: list[dict[str, Any]] = []
                for number, problem in enumerate(problems):
                    now = time.monotonic()
                    left = began + arguments.seconds - now
                    if left <= 0 and number:
                        print(f"no time is left for {len(problems) - number} layers", flush=True)
                        break
                    print(f"{now - began:5.0f} s  n={problem.n} k={problem.k}", flush=True)
                    until = now + left / (len(problems) - number)
                    keep = partial(kept, document, earlier, arguments.out, began, done)
                    one_layer(bench, problem, ranges, arguments, until, record, keep, pool)
                    done = list(document["problems"])
                ledger.finish_run(run)
        finally:
            for runner in bench.runners.values():
                runner.close()
    print((arguments.out / "regret.txt").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
