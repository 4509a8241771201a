"""A whole probe of one device: build, recall what is known, probe what is not, and judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..cache import state
from ..cache.ledger import Ledger
from ..cache.rows import Audit, BucketKey, Environment, Probed
from ..machine.memory import free_memory
from ..probes.problem import Problem
from ..probes.regimes import REGIMES
from ..probes.seeds import derive
from . import chains, spending
from .agreement import Agreement
from .device_lock import turn
from .entrants import Entrant, Layer
from .evidence import failures
from .evidence.method import method
from .evidence.recorder import Recorder
from .layer import probe_layer
from .plan import Plan, Report
from .runner import Progress, Runner
from .soak import Purse
from .stages import audit as auditing
from .stages import build, conclude, controls, recall, resume
from .stages.build import environment_of, survey
from .stages.quantise import probe_quantisers, time_quantisers
from .verdict.buckets import MRange, ranges
from .verdict.rules import Doubt

__all__ = ["Plan", "Report", "environment_of", "probe", "survey"]

_CPU_CACHE = 32 << 20
"""Last-level cache that weights are rotated through on a CPU, in bytes."""


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
    memory = recall.Memory(plan, ledger, state_dir)
    progress("survey", "asking every backend what it supports")
    start = time.monotonic()
    entered = build.enrol(plan, stack, report, progress)
    able = entered.able
    controller = controls.runner_of(plan, progress)
    stack.callback(controller.close)

    def control() -> Future[dict[str, Doubt]]:
        return pool.submit(controls.of_probe, plan, controller, ledger, report.run, progress)

    # Neither is timed, so both run while backends are compiled.
    controlled = None if all(memory.of(problem) for problem in able) else control()
    quantised = pool.submit(_quantisers, plan, ledger, record, memory, progress)
    there, unbuilt = _ready(plan, pool, entered, memory, ledger, report, progress, state_dir)
    for runner in there:
        environment = environment_of(runner, plan.target)
        report.environments.append(environment)
        ledger.add_environment(environment)
        record.knows(runner.name, environment.fingerprint)
    environments, unsupported, broken = quantised.result()
    report.environments += environments
    report.unsupported.update(unsupported)
    report.broken.update(broken)
    with_chains = chains.REGIME not in plan.level.without
    begins = {p: with_chains and p in chains.firsts(tuple(able)) for p in able}
    prints = {runner.name: record.fingerprint(runner.name) for runner in there}
    taking = {p: [r.name for r in field_ if r in there] for p, field_ in able.items()}
    recalled = memory.recall(taking, prints, begins, agreement)
    needed = [r for r in unbuilt if any(recalled[p].times is None for p in entered.of(r))]
    built = build.build(pool, entered, needed, ledger, report, progress, state_dir)
    there = [runner for runner in there if runner not in needed or runner in built]
    audits = _audits(plan, stack, there, ledger, progress)
    tasks = _tasks(plan, able, there, recalled, begins, agreement)
    measured = any(not entrant.known for _, entrants in tasks for entrant in entrants)
    if measured and controlled is None:
        controlled = control()
    doubts = controlled.result() if controlled else {}
    report.build_wall_seconds = round(time.monotonic() - start, 1)
    if environments and any(not e.known for _, entrants in tasks for e in entrants):
        progress("quantisers", "timing side by side")
        time_quantisers(environments, plan, record, progress)
    for layer, entrants in tasks:
        resume.into(record, recalled[layer.problem], entrants)
        report.known.append(resume.row(layer, entrants, recalled[layer.problem], ledger))
    if said := resume.sentence(report.known):
        progress("layers", said)
    at_once = pool if plan.target.device.kind == "cuda" else None
    budget = spending.allow(plan, record, doubts, start)
    tasks = [(replace(layer, allowance=budget), entrants) for layer, entrants in tasks]
    for layer, _ in tasks:
        if budget and layer.purse:
            layer.purse.until = budget.end
    cut: list[Layer] = []
    for number, (layer, entrants) in enumerate(tasks, 1):
        if recalled[layer.problem].times is not None:
            continue
        if budget and budget.over:
            cut.append(layer)
            continue
        p = layer.problem
        title = f"layer {number}/{len(tasks)} {p.format} n={p.n} k={p.k}"
        since = time.time()
        probe_layer(layer, entrants, record, partial(progress, title), at_once)
        if budget and budget.over:
            cut.append(layer)
        else:
            mine = recalled[p].entries
            ledger.add_probed(resume.probed(plan, layer, entrants, mine, record, since, doubts))
        report.spent += layer.clock.rows(p.n, p.k)
    # At the end, when all launches of a kernel are known, on whatever layer, and its machine code.
    for backend, modules in audits().items():
        for module in modules:
            if module.verdict == auditing.FLAGGED:
                record.audited(backend, module)
    prints = {e.backend: e.fingerprint for e in report.environments}
    before = failures.earlier(plan, ledger, prints, report.run)
    judged = conclude.candidates(plan, tasks, record, ledger, doubts, before)
    report.candidates, report.left = spending.unfinished(judged, cut)
    report.audits = [audit for modules in audits().values() for audit in modules]
    report.findings = record.findings
    report.timings = list(record.timings.values())
    report.seconds = round(max(0.0, time.monotonic() - start - report.build_wall_seconds), 1)


def _ready(
    plan: Plan,
    pool: ThreadPoolExecutor,
    entered: build.Field,
    memory: recall.Memory,
    ledger: Ledger,
    report: Report,
    progress: Progress,
    state_dir: Path,
) -> tuple[list[Runner], list[Runner]]:
    """Start every backend, and build those that cannot be told apart from others without.

    Returns those that worked, and of them those that are not built: they have no compiled files, so
    their environment is known, and all their layers may be, too.
    """
    maybe = [r for r in entered.runners if all(memory.of(p, r.name) for p in entered.of(r))]
    started = build.start(pool, maybe, ledger, report)
    unbuilt = [runner for runner in started if not runner.hello["has_files"]]
    first = [r for r in entered.runners if r not in unbuilt and (r in started or r not in maybe)]
    built = build.build(pool, entered, first, ledger, report, progress, state_dir)
    return [r for r in entered.runners if r in built or r in unbuilt], unbuilt


def _quantisers(
    plan: Plan, ledger: Ledger, record: Recorder, memory: recall.Memory, progress: Progress
) -> tuple[list[Environment], dict[str, str], dict[str, str]]:
    """Activation quantisers that are not known; see `quantising`."""

    def there(name: str, print_: str, bucket: BucketKey) -> bool:
        found = memory.quantised(bucket, name, print_)
        if found is not None:
            record.recall((), *found)
        return found is not None

    def done(name: str, print_: str, bucket: BucketKey, at: float) -> None:
        how = {name: resume.how(plan, print_, record.run, at)}
        detail = {"samples": 0, "entrants": how}
        ledger.add_probed(Probed(record.run, bucket, recall.device(plan), method(), detail))

    return probe_quantisers(
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
        there,
        done,
    )


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


def _tasks(
    plan: Plan,
    able: Mapping[Problem, Sequence[Runner]],
    there: Sequence[Runner],
    recalled: Mapping[Problem, recall.Recalled],
    begins: Mapping[Problem, bool],
    agreement: Agreement | None,
) -> list[tuple[Layer, list[Entrant]]]:
    """Every layer with its entrants, those that are known brought to where they were."""
    dead: dict[str, dict[str, str]] = {runner.name: {} for runner in there}
    asked = {
        runner.name: _tactics(runner, {p: recalled[p] for p in able if runner in able[p]})
        for runner in there
    }
    tasks = []
    for problem, field_ in able.items():
        layer = _layer(plan, problem, there, agreement, begins[problem])
        entries = recalled[problem].entries
        entrants = []
        for runner in (r for r in field_ if r in there):
            line = bool(runner.hello.get("reference_line"))
            entrant = Entrant(runner, asked[runner.name][problem], line, dead[runner.name])
            if runner.name in entries:
                rows = recalled[problem].evidence[runner.name]
                resume.resume(entrant, entries[runner.name], rows)
            entrants.append(entrant)
        tasks.append((layer, entrants))
    purse = _purse(plan, [e for _, entrants in tasks for e in entrants])
    return [(replace(layer, purse=purse), entrants) for layer, entrants in tasks]


def _tactics(
    runner: Runner, layers: Mapping[Problem, recall.Recalled]
) -> dict[Problem, dict[MRange, list[str]]]:
    """The backend's tactics for every layer it takes part in, by range of m.

    Asked once, and before any layer: a worker that died in one must not be waited for before the
    next begins.
    """
    found: dict[Problem, dict[MRange, list[str]]] = {}
    pairs = []
    for problem, recalled in layers.items():
        entry = recalled.entries.get(runner.name)
        if entry is None:
            pairs += [(problem, m) for m in ranges(problem.m)]
        else:
            tried = recall.tactics_of(entry)
            found[problem] = {m: tried[m] for m in ranges(problem.m)}
    answers = runner.tactics([problem.at(m.hi) for problem, m in pairs]) if pairs else []
    for (problem, m), names in zip(pairs, answers, strict=True):
        found.setdefault(problem, {})[m] = names
    return found


def _purse(plan: Plan, entrants: Sequence[Entrant]) -> Purse | None:
    """What may be spent on the aim; `entrants` are those of every layer, one after the other."""
    if plan.aim is None:
        return None
    tried = [e for e in entrants if not (e.reference_line or e.known)]
    regimes = tuple(name for name in plan.profile.required if name in REGIMES)
    parts = len(tried) * len(regimes)
    return Purse(plan.aim, plan.max_seconds, plan.max_launches, parts, regimes)


def _layer(
    plan: Plan,
    problem: Problem,
    runners: Sequence[Runner],
    agreement: Agreement | None,
    begins_mlp: bool,
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
        agreement=agreement,
        begins_mlp=begins_mlp,
    )
