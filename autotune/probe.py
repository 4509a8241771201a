"""A whole probe of one device: build, recall what is known, probe what is not, and judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import TypeVar

from ..cache import state
from ..cache.errors import Full, StateError
from ..cache.ledger import Ledger, set_aside
from ..cache.rows import Audit, Build, Where
from ..engines import names
from ..machine.memory import free_memory
from ..probes.audit import FLAGGED
from ..probes.problem import Problem
from ..probes.regimes import REGIMES
from ..probes.seeds import derive
from ..probes.worker.supervisor import WorkerFailed
from . import chains
from .agreement import Agreement
from .budget import A_BUILD, FOR_BUILDS, TimeBudget
from .choice.rank import FLOORS
from .device_lock import device_lock
from .environment import environment_of
from .evidence import earlier_failures
from .evidence.kept import with_what_is_kept
from .evidence.recorder import Recorder
from .evidence.wording import known_sentence
from .history import History, Recalled, tactics_of
from .keys import bucket_key
from .layer import Entrant, ProbedLayer
from .plan import Plan, Report
from .probed import Done, entered, probed
from .regime import Wanted, for_a_model
from .runner import Progress, Readied, Runner, Stopped, close_all
from .stages.audit import SECONDS, audit
from .stages.build import build
from .stages.collective import collective
from .stages.conclude import Grounds, conclude
from .stages.controls import KINDS, control
from .stages.grade import grade
from .stages.prove import prove
from .stages.quantise import Quantised, probe_quantisers
from .stages.quantiser_timing import time_quantisers
from .stages.recall import take_up
from .stages.start import start
from .stages.stress import stress
from .stages.survey import Field, enrol
from .stages.timing import time_layer
from .steps import BEGUN
from .verdict.buckets import MRange, ranges
from .verdict.rules import SAFE, Doubts, judge

T = TypeVar("T")

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
    target = plan.target
    lock = state.probe_lock(state_dir, target.uuid or target.label)
    with state.exclusive(lock, f"the probe of {target.label}"), device_lock(target, state_dir):
        run = ledger.start_run(
            seed=plan.seed,
            level=plan.level.name,
            profile=plan.profile.name,
            device=plan.device,
            argv=plan.argv,
        )
        try:
            with Probe(plan, ledger, state_dir, progress, agreement, run) as it:
                report = it.run()
        except (KeyboardInterrupt, Stopped):
            ledger.finish_run(run, "interrupted")
            raise
        except BaseException as error:
            with suppress(StateError):  # on a full disk: it counts as interrupted, then
                ledger.finish_run(run, "failed")
            if isinstance(error, Full):
                raise with_what_is_kept(error, state_dir, [run]) from error
            raise
        ledger.finish_run(run)
    return report


Layers = list[tuple[ProbedLayer, list[Entrant]]]


class Probe:
    """One probe of one device, from survey to verdicts. `run` has its steps in order; each lives
    in a stage and is given what it uses."""

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        state_dir: Path,
        progress: Progress,
        agreement: Agreement | None,
        run: str,
    ) -> None:
        self.plan = plan
        self.ledger = ledger
        self.state_dir = state_dir
        self._ending = False
        self._told = progress
        self.agreement = agreement
        self.report = Report(run, plan.seed, plan.target)
        self.record = Recorder(ledger, run, plan.seed)
        self.history = History(plan, ledger, state_dir)
        # Workers die with the thread that started them, so these threads outlive them all.
        self._pool = ThreadPoolExecutor(max_workers=3 + 2 * len(plan.backends))
        self._open = ExitStack()
        self._open.enter_context(self._pool)
        self._start = time.monotonic()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, raised: object, *_: object) -> None:
        if raised is not None:
            # What threads of the pool still do is told to end, not waited for.
            self._ending = True
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._open.close()

    def progress(self, who: str, text: str) -> None:
        """Tell what is done. Raises Stopped where this probe ends early, for threads beside it."""
        if self._ending:
            raise Stopped
        self._told(who, text)

    def run(self) -> Report:
        """Every step. Raises StateError where the state cannot be written."""
        taking = self._survey()
        # Neither is timed, so both run while backends are compiled.
        known = all(self.history.of(problem) for problem in taking.able)
        before = self.plan.doubts
        controlled = None if known or before is not None else self._control()
        quantised = self._pool.submit(
            probe_quantisers, self.plan, self.ledger, self.record, self.history, self.progress
        )
        there, unbuilt = self._ready(taking)
        there = self._environments(there, quantised)
        recalled = self._recall(taking, there)
        needed = [r for r in unbuilt if any(recalled[p].times is None for p in taking.of(r))]
        built = self._build(taking, needed)
        there = [runner for runner in there if runner not in needed or runner in built]
        audits, there = self._audit(there)
        layers = self._layers(taking, there, recalled)
        measured = any(not entrant.known for _, entrants in layers for entrant in entrants)
        if measured and controlled is None and before is None:
            controlled = self._control()
        doubts = controlled.result() if controlled else before or Doubts()
        self.report.doubts = doubts
        self.report.build_wall_seconds = round(time.monotonic() - self._start, 1)
        if measured and quantised.result().environments:
            self.progress("quantisers", "timing side by side")
            time_quantisers(quantised.result().environments, self.plan, self.record, self.progress)
        layers = self._budgeted(layers)
        cut = self._measure(layers, recalled, doubts)
        self._add_up([each for each in layers if each[0] not in cut], doubts)
        # At the end, when all launches of a kernel are known, and its machine code.
        self._condemn(audits.result())
        self._conclude(layers, cut, doubts)
        spent = time.monotonic() - self._start - self.report.build_wall_seconds
        self.report.seconds = round(max(0.0, spent), 1)
        return self.report

    def _survey(self) -> Field:
        """Who takes part in what."""
        self.progress("survey", "asking every backend what it supports")
        taking = enrol(self.plan, self.progress)
        self.progress("survey", taking.in_words())
        self._open.callback(close_all, taking.runners)
        self.report.unsupported.update(taking.unsupported)
        self.report.broken.update(taking.broken)
        return taking

    def _control(self) -> Future[Doubts]:
        """The controls of every regime that is run, in a worker of their own; those of dense layers
        and of routed experts, as far as there are any."""
        plan = self.plan
        # A hang is looked for among backends; this one has none, and may have to compile.
        patience = replace(plan, hang_seconds=None).patience
        groups = {problem.groups > 1 for problem in plan.problems}
        runners = {}
        for kind in (kind for kind, grouped in KINDS.items() if grouped in groups):
            runners[kind] = Runner(kind.name, plan.target, patience, plan.python, self.progress)
            self._open.callback(runners[kind].close)
        regimes = [name for name in REGIMES if name not in plan.level.without]

        def each() -> Doubts:
            found = {
                KINDS[kind]: control(runner, regimes, plan.seed, kind, self.ledger, self.report.run)
                for kind, runner in runners.items()
            }
            return Doubts(found.get(False, {}), found.get(True, {}))

        return self._pool.submit(each)

    def _ready(self, taking: Field) -> tuple[list[Runner], list[Runner]]:
        """Start every backend, and build those that cannot be told apart from others without.

        Returns those that worked, and of them those that are not built: they have no compiled
        files, so their environment is known, and all their layers may be, too.
        """
        history = self.history
        maybe = [
            runner
            for runner in taking.runners
            if all(history.of(problem, runner.name) for problem in taking.of(runner))
        ]
        started = self._worked(start(self._pool, maybe))
        unbuilt = [runner for runner in started if not runner.hello["has_files"]]
        first = [r for r in taking.runners if r not in unbuilt and (r in started or r not in maybe)]
        built = self._build(taking, first)
        return [r for r in taking.runners if r in built or r in unbuilt], unbuilt

    def _build(self, taking: Field, runners: Sequence[Runner]) -> list[Runner]:
        """Compile these for their layers, and for what comes behind these in a chain, which takes
        whatever is offered for the edges of a range."""
        wanted = {}
        for runner in runners:
            own = [p.at(m.hi) for p in taking.of(runner) for m in ranges(p.m)]
            behind = [
                p.at(m) for p in taking.also[runner] for r in ranges(p.m) for m in (r.lo, r.hi)
            ]
            wanted[runner] = list(dict.fromkeys([*own, *behind]))
        budget = self.plan.budget
        until = inf
        if budget is not None:
            least = min(self._start + budget, time.monotonic() + A_BUILD)
            until = max(self._start + FOR_BUILDS * budget, least)
        return self._worked(build(self._pool, wanted, self.state_dir, self.progress, until))

    def _worked(self, readied: Readied) -> list[Runner]:
        """Those that worked; all are told and stored."""
        run = self.report.run
        for name, seconds in readied.seconds.items():
            self.report.build_seconds[name] = seconds
            self.ledger.add_build(Build(run, name, seconds))
        for name, (doing, failure) in readied.failed.items():
            self.report.broken[name] = f"{failure.kind} while {doing}: {failure}"
            detail = {"failed": failure.kind, "message": str(failure), "log": failure.log}
            self.ledger.add_build(Build(run, name, 0.0, detail))
        return readied.runners

    def _answers(
        self, runners: Iterable[Runner], what: str, ask: Callable[[Runner], T]
    ) -> dict[Runner, T]:
        """What each of these answered, before any layer; one that fails takes part no longer, and
        that is told."""
        found: dict[Runner, T] = {}
        for runner in runners:
            try:
                found[runner] = ask(runner)
            except WorkerFailed as failure:
                self.report.broken[runner.name] = f"{failure.kind} while {what}: {failure}"
        return found

    def _environments(self, there: Sequence[Runner], quantised: Future[Quantised]) -> list[Runner]:
        """The environments that evidence of this run holds for; the runners that have one."""
        known = self._answers(there, "naming its files", environment_of)
        for runner, environment in known.items():
            self.report.environments.append(environment)
            self.ledger.add_environment(environment)
            self.record.knows(runner.name, environment.fingerprint)
        found = quantised.result()
        self.report.environments += found.environments
        self.report.unsupported.update(found.unsupported)
        self.report.broken.update(found.broken)
        return list(known)

    def _begins(self, taking: Field) -> dict[Problem, bool]:
        """Which layers ``mlp-chain`` is run with as its first."""
        firsts = chains.firsts(tuple(taking.able))
        with_chains = chains.REGIME not in self.plan.level.without
        return {problem: with_chains and problem in firsts for problem in taking.able}

    def _recall(self, taking: Field, there: Sequence[Runner]) -> dict[Problem, Recalled]:
        """What of every layer need not be measured again."""
        names = {p: [r.name for r in able if r in there] for p, able in taking.able.items()}
        prints = {runner.name: self.record.fingerprint(runner.name) for runner in there}
        found = self.history.recall(names, prints, self._begins(taking), self.agreement)
        self.report.set_aside = [set_aside(*each) for each in self.history.damaged.items()]
        for sentence in self.report.set_aside:
            self.progress("ledger", sentence)
        return found

    def _audit(
        self, runners: Sequence[Runner]
    ) -> tuple[Future[dict[str, list[Audit]]], list[Runner]]:
        """The audit of what these backends have compiled, begun beside everything else, and those
        that said what that is: nobody else is measured."""
        answers = self._answers(runners, "naming its files", lambda each: each.ask("files"))
        files = {runner.name: list(names) for runner, names in answers.items()}
        device = self.plan.target.device
        # In a pool of its own: where a probe ends early, a disassembly is not waited for.
        pool = ThreadPoolExecutor(1, "fp4tune-audit")
        self._open.callback(pool.shutdown, wait=False, cancel_futures=True)
        seconds = SECONDS
        if self.plan.budget is not None:
            seconds = min(seconds, max(0.0, self._start + self.plan.budget - time.monotonic()))
        say = partial(self.progress, "audit")
        audits = pool.submit(audit, files, device.sm, self.ledger, say, seconds)
        if device.kind == "cpu":
            audits.result()  # the cores it takes are those that would be timed
        return audits, list(answers)

    def _layers(
        self,
        taking: Field,
        there: Sequence[Runner],
        recalled: Mapping[Problem, Recalled],
    ) -> Layers:
        """Every layer with its entrants; what is known of them is part of this run, and is said."""
        plan = self.plan
        engine = plan.profile.name if plan.profile.name in names.ENGINES else None
        dead: dict[str, dict[str, str]] = {runner.name: {} for runner in there}
        asked = self._answers(
            there,
            "saying its tactics",
            lambda each: _tactics(each, {p: recalled[p] for p in taking.of(each)}, engine),
        )
        begins = self._begins(taking)
        seen = there[0].hello["device"] if there else {}
        memory = int(0.3 * seen.get("free", free_memory()) / max(1, len(there)))
        layers = []
        for problem, able in taking.able.items():
            layer = ProbedLayer(
                plan.target,
                problem,
                tuple(ranges(problem.m)),
                plan.level,
                derive(plan.seed, "layer", problem),
                memory=memory,
                cache_bytes=int(seen.get("l2_bytes", _CPU_CACHE)),
                agreement=self.agreement,
                begins_mlp=begins[problem],
                engine=engine,
                timed=recalled[problem].timed,
            )
            entrants = [
                Entrant(r, asked[r][problem], bool(r.hello.get("reference_line")), dead[r.name])
                for r in able
                if r in asked
            ]
            known = take_up(layer, entrants, recalled[problem], self.record, self.ledger)
            self.report.known.append(known)
            layers.append((layer, entrants))
        if said := known_sentence(self.report.known):
            self.progress("layers", said)
        return layers

    def _budgeted(self, layers: Layers) -> Layers:
        """The layers with the time that the probe may take.

        Builds are part of the time and all end before the first layer begins: compilers take the
        cores that launch what is timed, so only a layer's grading could overlap, and that needs
        all its entrants.
        """
        if self.plan.budget is None:
            return layers
        limit = TimeBudget(self.plan.budget, self._start)
        return [(replace(layer, time=limit), entrants) for layer, entrants in layers]

    def _is_right(self, doubts: Doubts) -> Callable[[Where], bool]:
        """Whether the verdict of a tactic in a bucket, as far as known, is safe, whatever rate of
        failures is to be bounded."""
        rules = replace(self.plan.rules, aims={})

        def right(where: Where) -> bool:
            mine = doubts.of(where.bucket.groups)
            return judge(self.record.facts(where), rules, doubts=mine).status == SAFE

        return right

    def _wanted(self, problem: Problem, doubts: Doubts, layers: int, begun: float) -> Wanted:
        """What is to be proven of the next of so many layers, the first of which was `begun` then:
        each has its part of the time, from when it begins.

        The floor of routed experts takes a hundred times as long as others on a GPU, and is proven
        where they are not.
        """
        plan = self.plan
        now = time.monotonic()
        until = begun + plan.seconds_of_aim
        if plan.budget is not None:
            until = min(until, self._start + plan.budget)
        usual = plan.profile.default_of(plan.target.device.sm, bucket_key(problem))
        floors = FLOORS if problem.groups == 1 or plan.on_cpu else ()
        also = frozenset({*floors, *([usual] if usual else [])})
        end = now + max(0.0, until - now) / max(1, layers)
        least = plan.least_seconds / max(1, layers)
        return Wanted(
            plan.aim,
            plan.profile.required,
            self._is_right(doubts),
            also,
            end,
            least,
            plan.enough,
        )

    def _measure(
        self, layers: Layers, recalled: Mapping[Problem, Recalled], doubts: Doubts
    ) -> list[ProbedLayer]:
        """Grade, time and stress every layer that is not known; those that a budget cut short."""
        pool = None if self.plan.on_cpu else self._pool
        cut: list[ProbedLayer] = []
        begun = time.monotonic()
        for number, (layer, entrants) in enumerate(layers, 1):
            known = recalled[layer.problem]
            if known.times is not None:
                continue
            if layer.time and layer.time.over:
                cut.append(layer)
                continue
            p, since = layer.problem, time.time()
            say = partial(self.progress, f"layer {number}/{len(layers)} {p.format} n={p.n} k={p.k}")
            done = Done(since, doubts.of(layer.problem.groups), known)
            for entrant in (e for e in entrants if not e.known):
                how = entered(self.plan, layer, entrant, self.record, done)
                self.record.finished(entrant.name, bucket_key(p), BEGUN, how)
            left = sum(recalled[each.problem].times is None for each, _ in layers[number - 1 :])
            wanted = self._wanted(p, doubts, left, begun)
            opened = grade(layer, entrants, self.record, say, pool)
            time_layer(layer, opened, self.record, say, pool)
            wanted = for_a_model(layer, opened, wanted)
            stress(layer, opened, self.record, say, wanted, pool)
            if wanted.aim.launches:
                prove(layer, opened, self.record, say, wanted, pool)
            list((pool.map if pool else map)(_let_go_of_layer, opened))
            if layer.time and layer.time.over:
                cut.append(layer)
            else:
                self.ledger.add_probed(probed(self.plan, layer, entrants, self.record, done))
            self.report.spent += layer.clock.rows(p.n, p.k)
        return cut

    def _add_up(self, layers: Layers, doubts: Doubts) -> None:
        """Sums over this GPU and another one that is probed at the same time."""
        say = partial(self.progress, "collective")
        partners = self.agreement.partners if self.agreement else {}
        partner = partners.get(self.plan.target.label)
        collective(layers, self._is_right(doubts), self.record, say, partner)

    def _condemn(self, audits: Mapping[str, Sequence[Audit]]) -> None:
        """Whatever ran of a flagged module is not safe."""
        for backend, modules in audits.items():
            self.report.audits += modules
            for module in modules:
                if module.verdict == FLAGGED:
                    self.record.audited(backend, module)

    def _conclude(self, layers: Layers, cut: Sequence[ProbedLayer], doubts: Doubts) -> None:
        """Verdicts, candidates, and what is left open."""
        plan, report = self.plan, self.report
        prints = {e.backend: e.fingerprint for e in report.environments}
        before = earlier_failures.earlier(plan, self.ledger, prints, report.run)
        grounds = Grounds(plan.target, plan.rules, plan.confidence, doubts, before)
        found = conclude(layers, cut, self.record, self.ledger, grounds)
        report.candidates, report.left = found.candidates, found.left
        report.findings = self.record.findings
        report.timings = list(self.record.timings.values())


def _let_go_of_layer(entrant: Entrant) -> None:
    """The layer of a worker that is let go of; one that dies now has shown all it had, and the next
    layer starts another."""
    with suppress(WorkerFailed):
        entrant.runner.close_layer()


def _tactics(
    runner: Runner, layers: Mapping[Problem, Recalled], engine: str | None
) -> dict[Problem, dict[MRange, list[str]]]:
    """The backend's tactics for every layer it takes part in, by range of m; where choices are made
    for an engine, of routed experts those that it could come to run, if there are any.

    Asked once, and before any layer: a worker that died in one must not be waited for before the
    next begins. Raises WorkerFailed.
    """
    found: dict[Problem, dict[MRange, list[str]]] = {}
    pairs = []
    for problem, recalled in layers.items():
        part = recalled.started.get(runner.name)
        entry = recalled.entries.get(runner.name, part.how if part else None)
        if entry is None:
            pairs += [(problem, m) for m in ranges(problem.m)]
        else:
            tried = tactics_of(entry)
            found[problem] = {m: tried[m] for m in ranges(problem.m)}
    answers = runner.tactics([problem.at(m.hi) for problem, m in pairs]) if pairs else []
    for (problem, m), tactics in zip(pairs, answers, strict=True):
        ours = [t for t in tactics if engine is None or names.runs_tactic(runner.name, t)]
        found.setdefault(problem, {})[m] = ours or tactics
    return found
