"""Who takes part: what each backend supports, asked before any is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...machine.devices import Target
from ...probes.problem import Problem
from ...probes.worker.supervisor import Worker, WorkerFailed
from .. import chains
from ..choice.rank import FLOORS
from ..plan import Plan
from ..runner import Patience, Progress, Runner


@dataclass(slots=True)
class Field:
    """Who can take part in what, and why the others cannot."""

    runners: list[Runner] = field(default_factory=list)
    able: dict[Problem, list[Runner]] = field(default_factory=dict)
    """By layer, where there is anything to choose."""
    also: dict[Runner, list[Problem]] = field(default_factory=dict)
    """The second GEMMs of chains, to be compiled beside a backend's layers."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """Backend to the reason it cannot run any of the problems here."""
    broken: dict[str, str] = field(default_factory=dict)
    """Backend to how it failed before any problem could be run."""

    def of(self, runner: Runner) -> list[Problem]:
        """The layers that a backend takes part in."""
        return [problem for problem, runners in self.able.items() if runner in runners]


def enrol(plan: Plan, progress: Progress) -> Field:
    """Ask every backend what it supports; those that can take part, none of them started."""
    with_chains = chains.REGIME not in plan.level.without
    others = chains.seconds(plan.problems) if with_chains else ()
    found = survey(plan.target, plan.backends, (*plan.problems, *others), plan.python)
    entered = Field(able={problem: [] for problem in plan.problems})
    for spec in plan.backends:
        answer = found[spec]
        if "error" in answer:
            entered.broken[spec] = answer["error"]
            continue
        reasons = answer["reasons"][len(plan.problems) :]
        answer["reasons"] = answer["reasons"][: len(plan.problems)]
        problems = [p for p, why in zip(plan.problems, answer["reasons"], strict=True) if not why]
        if not problems:
            entered.unsupported[answer["name"]] = _reason(answer, plan.problems)
            continue
        runner = Runner(spec, plan.target, plan.patience, plan.python, progress, hello=answer)
        entered.runners.append(runner)
        entered.also[runner] = [p for p, why in zip(others, reasons, strict=True) if not why]
        for problem in problems:
            entered.able[problem].append(runner)
    entered.able = {p: able for p, able in entered.able.items() if _worthwhile(p, able)}
    for runner in entered.runners:
        if not entered.of(runner):
            why = "left out: there is nothing here to compare it with"
            entered.unsupported[runner.name] = why
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
