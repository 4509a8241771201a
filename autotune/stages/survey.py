"""Who takes part in what, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...probes.problem import Problem
from .. import chains
from ..asking import survey
from ..choice.rank import FLOORS
from ..plan import Plan
from ..runner import Progress, Runner

_NO_GPU = "needs a CUDA GPU"
_MOST_NAMES = 8


@dataclass(frozen=True, slots=True)
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

    def in_words(self) -> str:
        """Who takes part, and why the others do not, in one line: reasons with how many they hold
        for, those of most first."""
        names = [runner.name for runner in self.runners]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        parts = [f"probing {', '.join(names[:_MOST_NAMES])}{more}" if names else "nothing to probe"]
        counted = Counter(_kind_of_reason(why) for why in self.unsupported.values())
        for (one, many), count in counted.most_common():
            parts.append(f"{count} backend{'s' if count > 1 else ''} {many if count > 1 else one}")
        if self.broken:
            parts.append(f"{len(self.broken)} did not load")
        return "; ".join(parts)


def enrol(plan: Plan, progress: Progress) -> Field:
    """Ask every backend what it supports; those that can take part, none of them started."""
    with_chains = chains.REGIME not in plan.level.without
    others = chains.seconds(plan.problems) if with_chains else ()
    every = (*plan.problems, *others)
    found = survey(plan.target, plan.backends, every, plan.python, plan.hang_seconds)
    entered = Field(able={problem: [] for problem in plan.problems})
    called: dict[str, str] = {}
    for spec in plan.backends:
        answer = found[spec]
        if "error" in answer:
            entered.broken[spec] = answer["error"]
            continue
        if (other := called.setdefault(answer["name"], spec)) != spec:
            why = f"it is called {answer['name']}, and so is {other}: what is found is kept by name"
            entered.broken[spec] = why
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
    worthwhile = {p: able for p, able in entered.able.items() if _worthwhile(p, able)}
    entered = replace(entered, able=worthwhile)
    for runner in entered.runners:
        if not entered.of(runner):
            why = "left out: there is nothing here to compare it with"
            entered.unsupported[runner.name] = why
    return replace(entered, runners=[r for r in entered.runners if entered.of(r)])


def _kind_of_reason(why: str) -> tuple[str, str]:
    """What a reason comes to, of one backend and of several."""
    if why.endswith(_NO_GPU):
        return "needs an NVIDIA GPU", "need an NVIDIA GPU"
    if "not on SM" in why or "runs on SM" in why:
        return "runs on other SMs", "run on other SMs"
    if "not installed" in why:
        return "is not installed", "are not installed"
    if why.startswith("left out"):
        return "has nothing here to be compared with", "have nothing here to be compared with"
    return "cannot run these layers", "cannot run these layers"


def _reason(answer: Mapping[str, Any], problems: Sequence[Problem]) -> str:
    """Why none of `problems` can run: of those with the backend's activation, where there are."""
    pairs = list(zip(problems, answer["reasons"], strict=True))
    own = [why for problem, why in pairs if problem.activation == answer["activation"]]
    return str((own or answer["reasons"])[0])


def _worthwhile(problem: Problem, runners: Sequence[Runner]) -> bool:
    """Whether there is anything to choose: for W4A4, more than the floor."""
    real = [r for r in runners if not r.hello.get("reference_line")]
    return any(r.name not in FLOORS for r in real) if problem.activation == "fp4" else bool(real)
