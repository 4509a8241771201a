"""What a probe is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from ..cache.rows import Audit, Candidate, Choice, Environment, Finding, Timing
from ..machine.devices import Target
from ..probes.data import FAMILIES
from ..probes.grouped.families import ODD_ROUTING
from ..probes.launch.item import LaunchAim
from ..probes.problem import Problem
from ..words import CERTAIN, CHANCE
from .budget import ENOUGH
from .choice.layouts import Comparison
from .levels import Level
from .runner import SILENCE, Patience
from .verdict.bounds import A_PROBLEM, Aim
from .verdict.profiles import Profile
from .verdict.rules import Doubts, Excuse, Rules
from .verdict.statistics import DEFAULT_CONFIDENCE

EXCUSES = {
    **{
        name: Excuse(family.condition, family.bounded_by)
        for name, family in FAMILIES.items()
        if family.condition is not None
    },
    **{name: Excuse(law.condition, law.bounded_by) for name, law in ODD_ROUTING.items()},
}

SLACK = 10
"""A regime in which nothing waits for chance is to bound a rate so many times as large."""
AT_LENGTH = 0.25
"""Of a level's time on a CPU, this is for launches at length."""


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
    """The failure rate that verdicts are to bound; None where they say what was reached."""
    confidence: float = DEFAULT_CONFIDENCE
    max_seconds: float = 3600.0
    """Seconds that bounding failure rates may take, over all backends and layers."""
    max_launches: int | None = None
    """Launches of one kernel in one regime, to the same end."""
    enough: int = ENOUGH
    """Proven candidates of a bucket, after which slower ones are left where time is limited."""
    budget: float | None = None
    """Seconds that the probe may take, from its start; None for what it needs. See `budget`."""
    again: bool = False
    """Measure what is known, too."""
    seed_given: bool = False
    """The seed was asked for: what is known from another does not answer that."""
    doubts: Doubts | None = None
    """What the controls showed of this device shortly before; None where they are to be run."""

    @property
    def on_cpu(self) -> bool:
        return self.target.device.kind == "cpu"

    @property
    def seconds_of_aim(self) -> float:
        """Seconds after the first layer was begun, in which `aim` is to be reached in all of them;
        inf where each kernel has its own."""
        if self.rate is not None:
            return self.max_seconds
        return self.level.on_cpu if self.on_cpu else inf

    @property
    def least_seconds(self) -> float:
        """Seconds of that which are for launches at length alone, however long the rest took."""
        asked = self.rate is not None or self.budget is not None
        return self.level.on_cpu * AT_LENGTH if self.on_cpu and not asked else 0.0

    @property
    def aim(self) -> LaunchAim:
        """What is to be shown of a kernel that is chosen, in a regime that waits for chance."""
        if self.rate is not None:
            launches, seconds = Aim(self.rate, self.confidence).launches, self.max_seconds
        else:
            launches = self.level.launches
            seconds = self.level.on_cpu if self.on_cpu else self.level.share
        if self.max_launches is not None:
            launches = min(launches, self.max_launches)
        return LaunchAim(launches, -(-launches // A_PROBLEM), seconds)

    @property
    def rules(self) -> Rules:
        """What verdicts of this probe are decided by."""
        aims = {}
        if self.rate is not None:
            loose = Aim(min(0.5, SLACK * self.rate), self.confidence)
            aims = {name: Aim(self.rate, self.confidence) for name in CHANCE}
            aims |= {name: loose for name in CERTAIN}
        return Rules(self.profile, aims, self.level.without, EXCUSES)

    @property
    def device(self) -> dict[str, Any]:
        """The device that rows of this probe are of."""
        return {"name": self.target.name, "uuid": self.target.uuid}

    @property
    def patience(self) -> Patience:
        return Patience(self.hang_seconds or SILENCE[self.target.device.kind])


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
    known: list[dict[str, Any]] = field(default_factory=list)
    """What of each layer came from earlier runs: see `recall.origin`."""
    left: list[dict[str, object]] = field(default_factory=list)
    """Layers in which the time budget ended before all m ranges had a proven candidate."""
    spent: list[dict[str, object]] = field(default_factory=list)
    """Where the time of each layer went: see `clock`."""
    set_aside: list[str] = field(default_factory=list)
    """Runs that are not as they were stored, and of which nothing is used: a sentence each."""
    doubts: Doubts = field(default_factory=Doubts)
    """What the controls showed."""

    @property
    def runs(self) -> list[str]:
        """The runs that hold what this rests on, this one first."""
        found = [self.run]
        for row in self.known:
            found += [each["run"] for each in row["known"]]
            found += [run for part in row["resumed"] for run in part["runs"]]
            found += [row["times"]] if row["times"] else []
        return list(dict.fromkeys(found))
