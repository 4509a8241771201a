"""A whole probe of one device: build, probe every layer, judge, choose, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Semaphore
from typing import Any

from ..cache import codedigest, fingerprint, state
from ..cache.ledger import Ledger
from ..cache.rows import Audit, Build, Candidate, Choice, Environment, Finding, Timing, Verdict
from ..probes.controls import NAME as CONTROLS
from ..probes.devices import Target
from ..probes.host import free_memory
from ..probes.problem import Problem
from ..probes.regimes import REGIMES
from ..probes.seeds import derive
from ..probes.supervisor import Worker, WorkerFailed
from . import auditing, chains, controls
from .agreement import Agreement
from .bounds import DEFAULT_CONFIDENCE, Aim, codes, kernel, pool
from .buckets import MRange, ranges
from .choose import FLOORS
from .layer import Entrant, Layer, probe_layer
from .layers import Comparison
from .levels import Level
from .profiles import Profile
from .quantising import probe_quantisers
from .record import Recorder
from .runner import Patience, Progress, Runner
from .soak import Purse
from .turn import turn
from .verdict import Doubt, decide

_GIB = 1 << 30
_BUILD_BYTES = 2 * _GIB
"""Memory a compiler may take: builds run in parallel only as far as this fits."""
_CPU_CACHE = 32 << 20
"""Last-level cache that weights are rotated through on a CPU, in bytes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to probe. `problems` have the largest m; one layer each."""

    target: Target
    backends: tuple[str, ...]
    problems: tuple[Problem, ...]
    level: Level
    profile: Profile
    seed: int
    python: str | None = None
    hang_seconds: float | None = None
    argv: tuple[str, ...] = ()
    quantisers: tuple[str, ...] = ()
    """Activation quantisers to probe on their own, where there are W4A4 problems."""
    rate: float | None = None
    """The failure rate to bound; None for the level's, which may have none."""
    confidence: float = DEFAULT_CONFIDENCE
    max_seconds: float = 3600.0
    """Seconds that bounding failure rates may take, over all backends and layers."""
    max_launches: int | None = None
    """Launches of one kernel in one regime, to the same end."""

    @property
    def aim(self) -> Aim | None:
        rate = self.level.rate if self.rate is None else self.rate
        return None if rate is None else Aim(rate, self.confidence)

    @property
    def patience(self) -> Patience:
        # A CPU computes in seconds what a GPU does in milliseconds.
        on_cpu = self.target.device.kind == "cpu"
        run, regime = (120.0, 120.0) if on_cpu else (30.0, 6.0)
        return Patience(self.hang_seconds or run, self.hang_seconds or regime)


@dataclass(slots=True)
class Report:
    """What a probe found, in rows as they were stored."""

    run: str
    seed: int
    target: Target
    choices: list[Choice] = field(default_factory=list)
    layers: list[Comparison] = field(default_factory=list)
    """The weight layouts of every layer probed, and the one chosen."""
    candidates: list[Candidate] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    """Backend to the reason it cannot run any of the problems here."""
    broken: dict[str, str] = field(default_factory=dict)
    """Backend to how it failed before any problem could be run: loading, building."""
    build_seconds: dict[str, float] = field(default_factory=dict)
    environments: list[Environment] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    """Of every module that a backend has for this GPU."""
    build_wall_seconds: float = 0.0
    """Loading and compiling all backends, at once: what a second probe mostly saves."""
    seconds: float = 0.0
    """All that came after."""
    generation: int | None = None
    spent: list[dict[str, object]] = field(default_factory=list)
    """Where the time of each layer went: see `clock`."""


def probe(
    plan: Plan,
    ledger: Ledger,
    state_dir: Path,
    progress: Progress,
    agreement: Agreement | None = None,
) -> Report:
    """Run `plan`. Evidence is in the ledger as it comes; `publication.publish` makes the choices.

    `agreement` is shared with the probes of other GPUs that run at the same time.

    Raises StateError where the state cannot be written, and Busy where another probe has the
    device.
    """
    with ExitStack() as stack:
        # Workers die with the thread that started them, so these threads outlive them all.
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=3 + len(plan.backends)))
        device = plan.target.uuid or plan.target.label
        lock = state.probe_lock(state_dir, device)
        stack.enter_context(state.exclusive(lock, f"the probe of {plan.target.label}"))
        stack.enter_context(turn(plan.target, state_dir))
        run = ledger.start_run(
            seed=plan.seed,
            level=plan.level.name,
            profile=plan.profile.name,
            device={"name": plan.target.name, "uuid": plan.target.uuid},
            argv=plan.argv,
        )
        report = Report(run, plan.seed, plan.target)
        try:
            _probe(plan, stack, pool, ledger, report, progress, state_dir, agreement)
        except BaseException:
            ledger.finish_run(run, "failed")
            raise
        ledger.finish_run(run)
    return report


def _probe(
    plan: Plan,
    stack: ExitStack,
    pool: ThreadPoolExecutor,
    ledger: Ledger,
    report: Report,
    progress: Progress,
    state_dir: Path,
    agreement: Agreement | None,
) -> None:
    record = Recorder(ledger, report.run, plan.seed)
    progress("survey", "asking every backend what it supports")
    start = time.monotonic()
    with_chains = chains.REGIME not in plan.level.without
    others = chains.seconds(plan.problems) if with_chains else ()
    found = survey(plan.target, plan.backends, (*plan.problems, *others), plan.python)
    runners: list[Runner] = []
    also: dict[int, list[Problem]] = {}
    able: dict[Problem, list[Runner]] = {problem: [] for problem in plan.problems}
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
        runners.append(runner)
        also[id(runner)] = [p for p, why in zip(others, reasons, strict=True) if not why]
        for problem in problems:
            able[problem].append(runner)
    able = {problem: field_ for problem, field_ in able.items() if _worthwhile(problem, field_)}
    for runner in runners:
        if not any(runner in field_ for field_ in able.values()):
            report.unsupported[runner.name] = "left out: there is nothing here to compare it with"
    # A hang is looked for among backends; this one has none, and may have to compile.
    usual = replace(plan, hang_seconds=None).patience
    controller = Runner(CONTROLS, plan.target, usual, plan.python, progress)
    stack.callback(controller.close)
    # Neither is timed, so both run while backends are compiled.
    controlled = pool.submit(_controls, plan, controller, ledger, report, progress)
    quantised = pool.submit(
        probe_quantisers,
        plan.quantisers,
        plan.target,
        plan.problems,
        plan.seed,
        plan.python,
        plan.patience,
        ledger,
        record,
        progress,
        environment_of,
    )
    built = _build(pool, runners, able, also, ledger, report, progress, state_dir)
    for runner in built:
        environment = environment_of(runner, plan.target)
        report.environments.append(environment)
        ledger.add_environment(environment)
        record.knows(runner.name, environment.fingerprint)
    environments, unsupported, broken = quantised.result()
    report.environments += environments
    report.unsupported.update(unsupported)
    report.broken.update(broken)
    audits = _audits(plan, stack, built, ledger, progress)
    doubts = controlled.result()
    report.build_wall_seconds = round(time.monotonic() - start, 1)
    dead: dict[str, dict[str, str]] = {runner.name: {} for runner in built}
    done: list[tuple[Layer, list[Entrant]]] = []
    purse = _purse(plan, [r for field_ in able.values() for r in field_ if r in built])
    for number, (problem, field_) in enumerate(able.items(), 1):
        begins = with_chains and problem in chains.firsts(tuple(able))
        layer = _layer(plan, problem, built, purse, agreement, begins)
        entrants = [
            Entrant(
                runner,
                _tactics(runner, layer),
                bool(runner.hello.get("reference_line")),
                dead[runner.name],
            )
            for runner in field_
            if runner in built
        ]
        title = f"layer {number}/{len(able)} {problem.format} n={problem.n} k={problem.k}"
        at_once = pool if plan.target.device.kind == "cuda" else None
        say = partial(progress, title)
        probe_layer(layer, entrants, record, say, at_once)
        done.append((layer, entrants))
        report.spent += layer.clock.rows(problem.n, problem.k)
    # At the end, when all launches of a kernel are known, on whatever layer, and its machine code.
    for backend, modules in audits().items():
        for module in modules:
            if module.verdict == auditing.FLAGGED:
                record.audited(backend, module)
    report.candidates = _candidates(plan, done, record, ledger, doubts)
    report.audits = [audit for modules in audits().values() for audit in modules]
    report.findings = record.findings
    report.timings = list(record.timings.values())
    report.seconds = round(time.monotonic() - start - report.build_wall_seconds, 1)


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


def _build(
    pool: ThreadPoolExecutor,
    runners: Sequence[Runner],
    able: Mapping[Problem, Sequence[Runner]],
    also: Mapping[int, Sequence[Problem]],
    ledger: Ledger,
    report: Report,
    progress: Progress,
    state_dir: Path,
) -> list[Runner]:
    """Start every backend and compile it, at once as far as memory goes; those that worked.

    Two probes never compile one backend at once: the second finds what the first has made.
    """
    wanted = {
        id(runner): [
            problem.at(m.hi)
            for problem, field_ in able.items()
            if runner in field_
            for m in ranges(problem.m)
        ]
        for runner in runners
    }
    active = [runner for runner in runners if wanted[id(runner)]]
    for runner in active:
        # What comes behind a layer in a chain is not probed, and not to be compiled in one either.
        wanted[id(runner)] += [p.at(m.hi) for p in also[id(runner)] for m in ranges(p.m)]
    room = max(1, free_memory() // _BUILD_BYTES)
    cores = len(os.sched_getaffinity(0))
    # Few backends have much to compile, so a half each keeps the machine busy to the end.
    workers = max(1, min(cores, room) // min(2, max(1, len(active))))
    room_for = Semaphore(min(len(active), room) or 1)

    def build(runner: Runner) -> float:
        lock = state.build_lock(state_dir, f"{runner.target.device.arch}-{runner.name}")
        what = f"the build of {runner.name}"
        with state.exclusive(lock, what, wait=runner.patience.build), room_for:
            return runner.build(wanted[id(runner)], workers)

    built = []
    futures = [(runner, pool.submit(build, runner)) for runner in active]
    for runner, future in futures:
        try:
            seconds = future.result()
        except WorkerFailed as failure:
            report.broken[runner.name] = f"{failure.kind} while building: {failure}"
            detail = {"failed": failure.kind, "message": str(failure), "log": failure.log}
            ledger.add_build(Build(report.run, runner.name, 0.0, detail))
            continue
        progress(runner.name, f"built in {seconds:.1f} s")
        report.build_seconds[runner.name] = seconds
        ledger.add_build(Build(report.run, runner.name, seconds))
        built.append(runner)
    return built


def _audits(
    plan: Plan, stack: ExitStack, runners: Sequence[Runner], ledger: Ledger, progress: Progress
) -> Callable[[], dict[str, list[Audit]]]:
    """Start the audit of what these backends have compiled; the function waits for it."""
    files = {runner.name: list(runner.ask("files")) for runner in runners}
    auditor = auditing.Auditor(files, plan.target.device.sm, ledger, partial(progress, "audit"))
    stack.callback(auditor.close)
    if plan.target.device.kind == "cpu":
        auditor.result()  # the cores it takes are those that would be timed
    return auditor.result


def _purse(plan: Plan, runners: Sequence[Runner]) -> Purse | None:
    """What may be spent on the aim; `runners` are those of every layer, one after the other."""
    if plan.aim is None:
        return None
    tried = [r for r in runners if not r.hello.get("reference_line")]
    regimes = tuple(name for name in plan.profile.required if name in REGIMES)
    parts = len(tried) * len(regimes)
    return Purse(plan.aim, plan.max_seconds, plan.max_launches, parts, regimes)


def _layer(
    plan: Plan,
    problem: Problem,
    runners: Sequence[Runner],
    purse: Purse | None = None,
    agreement: Agreement | None = None,
    begins_mlp: bool = True,
) -> Layer:
    seen = runners[0].hello["device"] if runners else {}
    return Layer(
        plan.target,
        problem,
        tuple(ranges(problem.m)),
        plan.level,
        derive(plan.seed, "layer", problem),
        memory=int(0.3 * seen.get("free", free_memory()) / max(1, len(runners))),
        cache_bytes=int(seen.get("l2_bytes", _CPU_CACHE)),
        purse=purse,
        agreement=agreement,
        begins_mlp=begins_mlp,
    )


def _tactics(runner: Runner, layer: Layer) -> dict[MRange, list[str]]:
    problems = [layer.problem.at(m.hi) for m in layer.ranges]
    return dict(zip(layer.ranges, runner.tactics(problems), strict=True))


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
    )
    # A reader cannot ask for versions, but it can see that a distribution was replaced.
    installed = tuple(fingerprint.stamp(path) for path in hello["metadata"])
    return replace(found, stamps=found.stamps + installed)


def _constant(device: Mapping[str, Any]) -> dict[str, Any]:
    """What stays the same from one probe to the next; free memory does not."""
    return {key: value for key, value in device.items() if key != "free"}


def _controls(
    plan: Plan, runner: Runner, ledger: Ledger, report: Report, progress: Progress
) -> dict[str, Doubt]:
    """Run the controls of every regime that this probe runs; the regimes that are in doubt."""
    progress("controls", "does each regime flag what is wrong, and only that?")
    regimes = [name for name in REGIMES if name not in plan.level.without]
    try:
        controls.start(runner, derive(plan.seed, CONTROLS))
        environment = environment_of(runner, plan.target)
    except WorkerFailed as failure:
        doubt = Doubt(f"the controls did not start: {failure.kind} ({failure})")
        return {name: doubt for name in regimes if name in controls.CONTROLS}
    ledger.add_environment(environment)
    found = controls.run(runner, regimes, ledger, report.run, environment.fingerprint)
    runner.close()
    for regime, doubt in found.items():
        progress("controls", f"{regime} is in doubt: {doubt.reason}")
    return found


def _candidates(
    plan: Plan,
    done: Sequence[tuple[Layer, Sequence[Entrant]]],
    record: Recorder,
    ledger: Ledger,
    doubts: Mapping[str, Doubt],
) -> list[Candidate]:
    """A verdict for every tactic that was tried, and a candidate for each backend's best."""
    found = []
    tried = {
        (entrant.name, layer.bucket(m)): entrant
        for layer, entrants in done
        for entrant in entrants
        for m in layer.ranges
    }
    known, pooled = codes(record.exact), pool(record.exact, plan.confidence)
    for (backend, tactic, bucket), facts in record.take_facts().items():
        entrant = tried[backend, bucket]
        mine = pooled.get(kernel(backend, tactic, bucket, known), {})
        bounds = {regime: bound.json() for regime, bound in mine.items()}
        judgement = decide(facts, plan.profile, mine, plan.aim, plan.level.without, doubts)
        if entrant.reference_line:
            reasons = ("a reference line, never chosen",)
            judgement = replace(judgement, status="inconclusive", conditions=(), reasons=reasons)
        conditions = tuple(asdict(c) for c in judgement.conditions)
        ledger.add_verdict(
            Verdict(
                run=record.run,
                fingerprint=record.fingerprint(backend),
                backend=backend,
                tactic=tactic,
                bucket=bucket,
                profile=plan.profile.name,
                status=judgement.status,
                conditions=conditions,
                reasons=judgement.reasons,
                bounds=bounds,
            )
        )
        m = MRange(bucket.m_lo, bucket.m_hi)
        if tactic != entrant.winner.get(m, entrant.tactics[m][0]):
            continue
        timing = record.timings.get((backend, tactic, bucket))
        found.append(
            Candidate(
                arch=plan.target.device.arch,
                gpu=plan.target.name,
                profile=plan.profile.name,
                bucket=bucket,
                backend=backend,
                tactic=tactic,
                layout=entrant.runner.hello["layout"],
                verdict=judgement.status,
                median_us=timing.median_us if timing else None,
                lo_us=timing.lo_us if timing else None,
                hi_us=timing.hi_us if timing else None,
                launches=judgement.launches,
                problems=judgement.problems,
                width=judgement.width,
                conditions=conditions,
                reasons=judgement.reasons,
                fingerprint=record.fingerprint(backend),
                bounds=bounds,
            )
        )
    return found
