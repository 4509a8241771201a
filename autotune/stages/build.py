"""Who takes part: what each backend supports, its build, and the environment it is in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Semaphore
from typing import Any

from ...cache import fingerprint, state
from ...cache.ledger import Ledger
from ...cache.rows import Build, Environment
from ...machine import codedigest
from ...machine.devices import Target
from ...machine.memory import free_memory
from ...probes.problem import Problem
from ...probes.worker.supervisor import Worker, WorkerFailed
from .. import chains
from ..choice.rank import FLOORS
from ..plan import Plan, Report
from ..runner import Patience, Progress, Runner
from ..verdict.buckets import ranges

_GIB = 1 << 30
_BUILD_BYTES = 2 * _GIB
"""Memory a compiler may take: builds run in parallel only as far as this fits."""


@dataclass(slots=True)
class Field:
    """Who can take part in what."""

    runners: list[Runner] = field(default_factory=list)
    able: dict[Problem, list[Runner]] = field(default_factory=dict)
    """By layer, where there is anything to choose."""
    also: dict[int, list[Problem]] = field(default_factory=dict)
    """By `id` of a runner: the second GEMMs of chains, to be compiled beside its layers."""

    def of(self, runner: Runner) -> list[Problem]:
        """The layers that a backend takes part in."""
        return [problem for problem, runners in self.able.items() if runner in runners]


def enrol(plan: Plan, stack: ExitStack, report: Report, progress: Progress) -> Field:
    """Ask every backend what it supports; those that can take part, none of them started.

    The others are in `report`, with the reason. Runners are closed with `stack`.
    """
    with_chains = chains.REGIME not in plan.level.without
    others = chains.seconds(plan.problems) if with_chains else ()
    found = survey(plan.target, plan.backends, (*plan.problems, *others), plan.python)
    entered = Field(able={problem: [] for problem in plan.problems})
    for spec in plan.backends:
        answer = found[spec]
        if "error" in answer:
            report.broken[spec] = answer["error"]
            continue
        reasons = answer["reasons"][len(plan.problems) :]
        answer["reasons"] = answer["reasons"][: len(plan.problems)]
        problems = [p for p, why in zip(plan.problems, answer["reasons"], strict=True) if not why]
        if not problems:
            report.unsupported[answer["name"]] = _reason(answer, plan.problems)
            continue
        runner = Runner(spec, plan.target, plan.patience, plan.python, progress, hello=answer)
        stack.callback(runner.close)
        entered.runners.append(runner)
        entered.also[id(runner)] = [p for p, why in zip(others, reasons, strict=True) if not why]
        for problem in problems:
            entered.able[problem].append(runner)
    entered.able = {p: field_ for p, field_ in entered.able.items() if _worthwhile(p, field_)}
    for runner in entered.runners:
        if not entered.of(runner):
            report.unsupported[runner.name] = "left out: there is nothing here to compare it with"
    entered.runners = [runner for runner in entered.runners if entered.of(runner)]
    return entered


def survey(
    target: Target,
    backends: Sequence[str],
    problems: Sequence[Problem],
    python: str | None = None,
) -> dict[str, dict[str, Any]]:
    """What each backend is and which problems it supports, by the name it was asked for.

    One process answers for all; where that dies each is asked alone. A value holds ``name``,
    ``activation``, ``layout``, ``reference_line`` and ``reasons`` (None where supported), or
    ``error``.
    """
    device = target.device
    worker = Worker(python, target.environment)
    try:
        answers: dict[str, dict[str, Any]] = worker.ask(
            "survey",
            Patience(0, 0).start,
            backends=list(backends),
            kind=device.kind,
            sm=device.sm,
            problems=[asdict(problem) for problem in problems],
        )
        return answers
    except WorkerFailed as failure:
        if len(backends) == 1:
            return {backends[0]: {"error": f"{failure.kind}: {failure}"}}
    finally:
        worker.close()
    alone = [survey(target, [backend], problems, python) for backend in backends]
    return {name: answer for each in alone for name, answer in each.items()}


def _reason(answer: Mapping[str, Any], problems: Sequence[Problem]) -> str:
    """Why none of `problems` can run: of those with the backend's activation, where there are."""
    pairs = list(zip(problems, answer["reasons"], strict=True))
    own = [why for problem, why in pairs if problem.activation == answer["activation"]]
    return str((own or answer["reasons"])[0])


def _worthwhile(problem: Problem, runners: Sequence[Runner]) -> bool:
    """Whether there is anything to choose: for W4A4, more than the floor."""
    real = [r for r in runners if not r.hello.get("reference_line")]
    return any(r.name not in FLOORS for r in real) if problem.activation == "fp4" else bool(real)


def build(
    pool: ThreadPoolExecutor,
    entered: Field,
    runners: Sequence[Runner],
    ledger: Ledger,
    report: Report,
    progress: Progress,
    state_dir: Path,
) -> list[Runner]:
    """Start these backends and compile them, at once as far as memory goes; those that worked.

    Two probes never compile one backend at once: the second finds what the first has made.
    """
    # What comes behind a layer in a chain is not probed, and not to be compiled in one either.
    wanted = {
        id(runner): [
            problem.at(m.hi)
            for problem in (*entered.of(runner), *entered.also[id(runner)])
            for m in ranges(problem.m)
        ]
        for runner in runners
    }
    room = max(1, free_memory() // _BUILD_BYTES)
    cores = len(os.sched_getaffinity(0))
    # Few backends have much to compile, so a half each keeps the machine busy to the end.
    workers = max(1, min(cores, room) // min(2, max(1, len(runners))))
    room_for = Semaphore(min(len(runners), room) or 1)

    def one(runner: Runner) -> float:
        lock = state.build_lock(state_dir, f"{runner.target.device.arch}-{runner.name}")
        what = f"the build of {runner.name}"
        with state.exclusive(lock, what, wait=runner.patience.build), room_for:
            return runner.build(wanted[id(runner)], workers)

    built = []
    futures = [(runner, pool.submit(one, runner)) for runner in runners]
    for runner, future in futures:
        try:
            seconds = future.result()
        except WorkerFailed as failure:
            _broken(runner, "building", failure, ledger, report)
            continue
        progress(runner.name, f"built in {seconds:.1f} s")
        report.build_seconds[runner.name] = seconds
        ledger.add_build(Build(report.run, runner.name, seconds))
        built.append(runner)
    return built


def start(
    pool: ThreadPoolExecutor, runners: Sequence[Runner], ledger: Ledger, report: Report
) -> list[Runner]:
    """Start these backends without compiling them; those that worked."""
    started = []
    for runner, future in [(runner, pool.submit(runner.start)) for runner in runners]:
        try:
            future.result()
        except WorkerFailed as failure:
            _broken(runner, "starting", failure, ledger, report)
            continue
        started.append(runner)
    return started


def _broken(
    runner: Runner, doing: str, failure: WorkerFailed, ledger: Ledger, report: Report
) -> None:
    report.broken[runner.name] = f"{failure.kind} while {doing}: {failure}"
    detail = {"failed": failure.kind, "message": str(failure), "log": failure.log}
    ledger.add_build(Build(report.run, runner.name, 0.0, detail))


def environment_of(runner: Runner, target: Target) -> Environment:
    """The fingerprint of what this backend's evidence depends on, as its worker sees it."""
    hello = runner.hello
    files = [Path(name) for name in runner.ask("files")]
    found = fingerprint.environment(
        device_info={**_constant(hello["device"]), **fingerprint.hardware(target.uuid)},
        backend=runner.name,
        arch=target.device.arch,
        distributions={**hello["versions"], "python": hello["python"]},
        files=files,
        variables=dict(os.environ),
        code=codedigest.combined(files),
        extra=fingerprint.source(hello["source"]),
    )
    # A reader cannot ask for versions, but it can see that a distribution was replaced.
    installed = tuple(fingerprint.stamp(path) for path in (*hello["metadata"], *hello["source"]))
    return replace(found, stamps=found.stamps + installed)


def _constant(device: Mapping[str, Any]) -> dict[str, Any]:
    """What stays the same from one probe to the next; free memory does not."""
    return {key: value for key, value in device.items() if key != "free"}
