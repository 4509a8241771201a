"""What the stages of a probe work on: a layer, and the backends that take part in it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..cache.rows import BucketKey, Under, Where
from ..engines import names
from ..machine.devices import Target
from ..probes.problem import Problem
from ..probes.regimes import ASIDE, REGIMES
from ..probes.seeds import derive
from ..probes.worker.supervisor import WorkerFailed
from ..words import NOT_TRIED
from . import chains, steps
from .agreement import Agreement
from .budget import TimeBudget
from .clock import Clock
from .evidence.recorder import Recorder
from .keys import bucket_key
from .levels import Level
from .runner import Runner
from .verdict.buckets import MRange, ragged

LARGE_M = 1024
"""Ranges above are run at their edges only: one launch there costs as much as dozens of small."""
SPARE_ROWS = 64
"""Rows of the pools beyond the largest m, so that even its launches can be on different rows."""

Item = dict[str, Any]
"""A tactic in an m range as a worker takes it: ``ms``, ``tactic``, ``width``."""


@dataclass(slots=True, eq=False)
class Entrant:
    """A backend in a layer: its tactics by m range, and what has been learnt of them."""

    runner: Runner
    tactics: dict[MRange, list[str]]
    reference_line: bool
    dead: dict[str, str]
    """Regimes in which the backend once took its worker down, and how; shared by all layers."""
    width: dict[tuple[MRange, str], int] = field(default_factory=dict)
    faulty: set[tuple[MRange, str]] = field(default_factory=set)
    """Tactics that failed on data no condition excuses; they are beaten by any that did not."""
    exempt: dict[tuple[str, MRange, str], str] = field(default_factory=dict)
    """By regime, m range and tactic: why it cannot have the fault that is looked for."""
    winner: dict[MRange, str] = field(default_factory=dict)
    median_us: dict[MRange, float] = field(default_factory=dict)
    known: bool = False
    """Graded and tried in an earlier run: here it is timed at most."""
    done: set[tuple[str, MRange, str]] = field(default_factory=set)
    """By step, m range and tactic: what is finished, here or in a run that was killed."""
    opens: bool = True
    """Whether the layer can be opened in its worker, as far as is known."""
    compared: bool = False
    """Whether `winner` holds: its tactics need not be compared again."""
    reached: dict[tuple[str, MRange, str], int] = field(default_factory=dict)
    """By step, m range and tactic, where many launches were made: how many were aimed at."""
    aside: Runner | None = None
    """The worker that has the layer open for the regimes in `ASIDE`; None: they are run in the
    one that runs all."""

    @property
    def name(self) -> str:
        return self.runner.name

    def runner_of(self, regime: str) -> Runner:
        """The worker that runs this regime."""
        return self.aside if self.aside is not None and regime in ASIDE else self.runner

    def left(self, what: str, items: Iterable[steps.Item], launches: int = 0) -> list[steps.Item]:
        """Those of `items` in which this step is still to be made, with so many launches."""
        return [
            (m, tactic)
            for m, tactic in items
            if (what, m, tactic) not in self.done
            or self.reached.get((what, m, tactic), 0) < launches
        ]

    def right_tactics(self, m: MRange) -> list[str]:
        """Tactics without a fault; where each has one, those that could be graded at least."""
        graded = [t for t in self.tactics[m] if (m, t) in self.width]
        return [t for t in graded if (m, t) not in self.faulty] or graded


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    """A layer of a probe, one (format, activation, dtype, n, k); `problem.m` is the largest m."""

    target: Target
    problem: Problem
    ranges: tuple[MRange, ...]
    level: Level
    seed: int
    memory: int
    """Bytes of the device that one backend's data may take at a time."""
    cache_bytes: int
    """Of the last-level cache, that weights are rotated through while they are timed."""
    clock: Clock = field(default_factory=Clock)
    begins_mlp: bool = True
    """Whether ``mlp-chain`` is run with this layer as its first."""
    agreement: Agreement | None = None
    """Shared with the probes of other GPUs; None where this is the only one."""
    time: TimeBudget | None = None
    """The time that the probe may take; None where it may take what it needs."""
    engine: str | None = None
    """The engine that choices are made for; None where they are for none."""
    timed: str | None = None
    """The run whose times hold for all who take part; None where they are to be timed."""

    @property
    def regimes(self) -> tuple[str, ...]:
        """Those that the level runs."""
        return tuple(name for name in REGIMES if name not in self.level.without)

    def bucket(self, m: MRange) -> BucketKey:
        return bucket_key(self.problem, m)

    def is_named(self, backend: str) -> bool:
        """Whether the engine that choices are made for has a word for it; all are where they are
        made for none."""
        sm = self.target.device.sm
        return not self.engine or bool(names.named(self.engine, backend, self.problem.format, sm))

    def named_first(self, backends: Sequence[str]) -> list[str]:
        """These, in their order, but what the engine cannot run behind all that it can: it is shown
        and never chosen, and proves nothing that is wanted."""
        return sorted(backends, key=lambda name: not self.is_named(name))

    @contextmanager
    def step(
        self,
        entrant: Entrant,
        what: str,
        items: Sequence[steps.Item],
        record: Recorder,
        launches: int = 0,
        **more: Any,
    ) -> Iterator[None]:
        """What is recorded within is a step of `entrant`, of these items and with so many launches
        as its aim: it is committed as one with the row that says that the step is finished, or not
        at all."""
        with record.together():
            yield
            made = [(what, m, tactic) for m, tactic in items]
            entrant.done.update(made)
            entrant.reached.update({key: launches for key in made})
            detail = {
                "items": steps.listed(items),
                "dead": dict(entrant.dead),
                "faulty": steps.listed(sorted(entrant.faulty)),
                "exempt": [[n, m.lo, m.hi, t, why] for (n, m, t), why in entrant.exempt.items()],
                "launches": launches,
                **more,
            }
            record.finished(entrant.name, bucket_key(self.problem), what, detail)

    def where(self, entrant: Entrant, m: MRange, tactic: str) -> Where:
        """What evidence of this tactic in this range is of."""
        return Where(entrant.name, tactic, self.bucket(m))

    def item(
        self,
        m: MRange,
        tactic: str,
        width: int = 24,
        tag: str = "",
        edges: bool = False,
        many: int = 0,
    ) -> Item:
        """A tactic in an m range as the worker takes it, with ragged m's drawn from the seed, or
        the range's edges only; `many` of them where that is more."""
        rng = random.Random(derive(self.seed, self.problem, m, tag))
        count = max(self.level.ragged, many) if m.hi <= LARGE_M and not edges else 2
        ms = ragged(m, count, rng)
        if tag.split(" ")[0] == chains.REGIME:
            # Each costs two GEMMs and a reference of their own.
            ms = [rng.choice(ms)]
        return {"ms": ms, "tactic": tactic, "width": width}

    def asked(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What a worker was asked, with the layer that was open."""
        rows = self.problem.m + SPARE_ROWS
        return {"do": do, "seed": self.seed, "rows": rows, **arguments}


def not_tried(where: Where, why: str, record: Recorder) -> None:
    """A time budget left this one out: its verdict cannot be safe, and says `why`."""
    record.status(where, Under(NOT_TRIED), "skipped", {"note": f"{NOT_TRIED}: {why}"})


def died(
    layer: ProbedLayer, entrant: Entrant, regime: str, failure: WorkerFailed, record: Recorder
) -> None:
    """A worker that failed outside a verdict's regimes: it is told, and gets no time."""
    for m, tactic in entrant.winner.items():
        record.failure(layer.where(entrant, m, tactic), Under(regime), failure)
