"""From evidence to a verdict. Pure: the same evidence and profile always give the same verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ...words import CENSUS, COLLECTIVE, EXACT, NO_FORM, NOT_TRIED, Condition
from .bounds import Aim, Bound, short_of_aim
from .profiles import LEFT_OUT, WITHOUT_FORM, Profile

__all__ = [
    "INCONCLUSIVE",
    "SAFE",
    "UNSAFE",
    "UNSUPPORTED",
    "Doubt",
    "Doubts",
    "Excuse",
    "Judgement",
    "Rules",
    "decide",
    "judge",
]

_ONLY_FAIL = (CENSUS, COLLECTIVE)
"""A census checks no launch, and sums over two GPUs are few: they can only fail a verdict."""

SAFE, UNSAFE, INCONCLUSIVE, UNSUPPORTED = "safe", "unsafe", "inconclusive", "unsupported"


class Fact(Protocol):
    """What a verdict reads of one row of evidence."""

    @property
    def regime(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def launches(self) -> int: ...
    @property
    def problems(self) -> int: ...
    @property
    def width(self) -> int | None: ...
    @property
    def detail(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict with its grounds.

    `launches` is the fewest checked launches of any regime passed, `problems` the fewest different
    ones; regimes are never summed, since each bounds failures under its own conditions only.
    """

    status: str
    conditions: tuple[Condition, ...] = ()
    reasons: tuple[str, ...] = ()
    width: int | None = None
    launches: int = 0
    problems: int = 0


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a regime proves nothing in this run: one of its controls did not come out as it should.

    A pass is worth nothing then; with `spoils`, what right kernels are flagged for, nor is a
    failure.
    """

    reason: str
    spoils: bool = False


@dataclass(frozen=True, slots=True)
class Doubts:
    """The doubts of a run by regime: of dense layers and of routed experts, whose controls are
    others."""

    dense: Mapping[str, Doubt] = field(default_factory=dict)
    experts: Mapping[str, Doubt] = field(default_factory=dict)

    def of(self, groups: int) -> Mapping[str, Doubt]:
        """Those of a layer of so many groups."""
        return self.dense if groups == 1 else self.experts


@dataclass(frozen=True, slots=True)
class Excuse:
    """The condition under which a family of data may fail, where `bounded_by`, the family just
    inside that condition, passes."""

    condition: Condition
    bounded_by: str | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What verdicts are decided by.

    A required regime that passed and has an aim in `aims` must also bound the failure rate of the
    compiled kernel that far. A required regime without evidence that was `left_out` on purpose is
    a condition, and not an open question. `excuses` are by family of data.
    """

    profile: Profile
    aims: Mapping[str, Aim] = field(default_factory=dict)
    left_out: Collection[str] = ()
    excuses: Mapping[str, Excuse] = field(default_factory=dict)


def judge(
    evidence: Sequence[Fact],
    rules: Rules,
    bounds: Mapping[str, Bound] | None = None,
    doubts: Mapping[str, Doubt] | None = None,
    reference_line: bool = False,
) -> Judgement:
    """The verdict of one tactic in one bucket; a reference line is measured and never judged.

    What a time budget left out is inconclusive for that reason, unless it is known to be unsafe.
    """
    tried = [fact for fact in evidence if fact.regime != NOT_TRIED]
    found = decide(tried, rules, bounds, doubts)
    if reference_line:
        reasons: tuple[str, ...] = ("a reference line, never chosen",)
    else:
        left_out = (fact for fact in evidence if fact.regime == NOT_TRIED)
        reasons = tuple({str(fact.detail["note"]): None for fact in left_out})
        if not reasons or found.status == UNSAFE:
            return found
    return replace(found, status=INCONCLUSIVE, conditions=(), reasons=reasons)


def decide(
    evidence: Iterable[Fact],
    rules: Rules,
    bounds: Mapping[str, Bound] | None = None,
    doubts: Mapping[str, Doubt] | None = None,
) -> Judgement:
    """Judge one (backend, tactic, bucket) by all evidence there is for it; `bounds` are its
    kernel's, by regime, and `doubts` those of this run's controls."""
    facts, profile = list(evidence), rules.profile
    conditions: list[Condition] = []
    unsafe: list[str] = []
    open_: list[str] = []
    width = max((f.width for f in facts if f.width is not None), default=None)

    for fact in facts:
        if fact.data != EXACT and fact.status == "failed":
            excuse = rules.excuses.get(fact.data)
            if excuse is None:
                unsafe.append(f"{fact.data} data: failed")
            elif _bounded(facts, excuse):
                conditions.append(excuse.condition)
            else:
                unsafe.append(f"{fact.data} data: failed, and no run bounds the fault")
    _missing_families(facts, open_)

    for regime in _regimes_to_judge(facts, profile):
        mine = [f for f in facts if f.regime == regime and f.data == EXACT]
        statuses = {f.status for f in mine}
        required = regime in profile.required
        doubt = (doubts or {}).get(regime)
        if doubt and statuses - {"not applicable"} and (doubt.spoils or "failed" not in statuses):
            if not required and regime in profile.conditions:
                conditions.append(profile.conditions[regime])
            else:
                open_.append(f"{regime}: control: {doubt.reason}")
            continue
        if not required and regime in profile.conditions:
            # Not proven under these launch conditions, so the engine must not make them.
            if statuses - {"passed", "not applicable"}:
                conditions.append(profile.conditions[regime])
        elif "failed" in statuses:
            unsafe.append(f"{regime}: failed")
        elif required and not statuses and regime in rules.left_out:
            conditions.append(LEFT_OUT)
        elif (
            required
            and statuses == {"not applicable"}
            and any(fact.detail.get("note") == NO_FORM for fact in mine)
        ):
            conditions.append(WITHOUT_FORM)
        elif required and statuses != {"passed"} and statuses != {"not applicable"}:
            open_.append(f"{regime}: {', '.join(sorted(statuses)) or 'not run'}")
        elif required and regime in rules.aims and statuses == {"passed"}:
            missed = short_of_aim(regime, (bounds or {}).get(regime), rules.aims[regime])
            if missed:
                open_.append(missed)

    launches, problems = _fewest(facts)
    if not launches:
        open_.append("no launch was checked")
    status = SAFE
    reasons: tuple[str, ...] = ()
    if unsafe:
        status, reasons = UNSAFE, tuple(unsafe)
    elif open_ or width is None:
        status, reasons = INCONCLUSIVE, tuple(open_) or ("never graded",)
    return Judgement(status, _unique(conditions), reasons, width, launches, problems)


def _fewest(facts: Sequence[Fact]) -> tuple[int, int]:
    """Launches and different problems behind the regime that passed on the fewest of each."""
    launches, problems = Counter[str](), Counter[str]()
    for fact in facts:
        if fact.status == "passed" and fact.data == EXACT and fact.regime not in _ONLY_FAIL:
            launches[fact.regime] += fact.launches
            problems[fact.regime] += fact.problems
    return min(launches.values(), default=0), min(problems.values(), default=0)


def _regimes_to_judge(facts: Sequence[Fact], profile: Profile) -> list[str]:
    seen = [f.regime for f in facts if f.data == EXACT]
    return list(dict.fromkeys([*profile.required, *seen]))


def _bounded(facts: Sequence[Fact], excuse: Excuse) -> bool:
    """Whether data just inside the condition was run and passed: else its edge is a guess."""
    return any(f.data == excuse.bounded_by and f.status == "passed" for f in facts)


def _missing_families(facts: Sequence[Fact], missing: list[str]) -> None:
    """Inexact data that ran without a result leaves the verdict open."""
    for fact in facts:
        if fact.data != EXACT and fact.status not in ("passed", "failed", "not applicable"):
            missing.append(f"{fact.data} data: {fact.status}")


def _unique(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    return tuple(dict.fromkeys(conditions))
