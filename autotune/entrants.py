"""What a layer's probe works on: the layer, and the backends that take part in it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cache.rows import BucketKey
from ..machine.devices import Target
from ..probes.problem import Problem
from ..probes.regimes import REGIMES
from ..probes.seeds import derive
from ..probes.worker.supervisor import WorkerFailed
from . import chains
from .agreement import Agreement
from .allowance import NOT_TRIED, Allowance
from .evidence.clock import Clock
from .evidence.recorder import Recorder
from .levels import Level
from .runner import Runner
from .soak import Purse
from .stages import retest
from .verdict.buckets import MRange, ragged
from .verdict.rules import EXACT

LARGE_M = 1024
"""Ranges above are run at their edges only: one launch there costs as much as dozens of small."""
SPARE_ROWS = 64
"""Rows of the pools beyond the largest m, so that even its launches can be on different rows."""

Item = dict[str, Any]


@dataclass(slots=True)
class Entrant:
    """A backend in this layer: its tactics by m range, and what has been learnt of them."""

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

    @property
    def name(self) -> str:
        return self.runner.name


@dataclass(frozen=True, slots=True)
class Layer:
    """What `probe_layer` works on. `problem.m` is the largest m."""

    target: Target
    problem: Problem
    ranges: tuple[MRange, ...]
    level: Level
    seed: int
    memory: int
    cache_bytes: int
    clock: Clock = field(default_factory=Clock)
    begins_mlp: bool = True
    """Whether `mlp-chain` is run with this layer as its first."""
    agreement: Agreement | None = None
    """Shared with the probes of other GPUs; None where this is the only one."""
    purse: Purse | None = None
    """What may be spent on bounding failure rates; None where no rate was asked for."""
    allowance: Allowance | None = None
    """The time that the probe may take; None where it may take what it needs."""

    @property
    def regimes(self) -> tuple[str, ...]:
        """Those that the level runs."""
        return tuple(name for name in REGIMES if name not in self.level.without)

    def bucket(self, m: MRange) -> BucketKey:
        p = self.problem
        return BucketKey(p.format, p.activation, p.out_dtype, p.groups, m.lo, m.hi, p.n, p.k)

    def item(
        self, m: MRange, tactic: str, width: int = 24, tag: object = "", edges: bool = False
    ) -> Item:
        """A tactic in an m range as the worker takes it, with ragged m's drawn from the seed, or
        the range's edges only."""
        rng = random.Random(derive(self.seed, self.problem, m, tag))
        count = self.level.ragged if m.hi <= LARGE_M and not edges else 2
        ms = ragged(m, count, rng)
        if tag == chains.REGIME:
            # Each costs two GEMMs and a reference of their own.
            ms = [rng.choice(ms)]
        return {"ms": ms, "tactic": tactic, "width": width}


def asked(layer: Layer, do: str, **arguments: Any) -> dict[str, Any]:
    """What a worker was asked, with the layer that was open."""
    rows = layer.problem.m + SPARE_ROWS
    return {"do": do, "seed": layer.seed, "rows": rows, **arguments}


def not_tried(
    layer: Layer, entrant: Entrant, m: MRange, tactic: str, why: str, record: Recorder
) -> None:
    """The time budget left this one out: a verdict cannot be safe, and says `why`."""
    note = {"note": f"{NOT_TRIED}: {why}"}
    record.status(entrant.name, tactic, layer.bucket(m), NOT_TRIED, EXACT, "skipped", note)


def died(
    layer: Layer, entrant: Entrant, regime: str, failure: WorkerFailed, record: Recorder
) -> None:
    """A worker that failed outside a verdict's regimes: it is told, and gets no time."""
    for m, tactic in entrant.winner.items():
        failed(layer, entrant, m, tactic, regime, EXACT, failure, record)


def failed(
    layer: Layer,
    entrant: Entrant,
    m: MRange,
    tactic: str,
    regime: str,
    data: str,
    failure: WorkerFailed,
    record: Recorder,
    question: dict[str, Any] | None = None,
) -> None:
    """A command on this tactic did not finish; `question` is what was asked."""
    record.failure(entrant.name, tactic, layer.bucket(m), regime, data, failure, question)


def try_again(
    layer: Layer,
    entrant: Entrant,
    pairs: Sequence[tuple[MRange, str]],
    regime: str,
    data: str,
    results: Sequence[dict[str, Any]],
    record: Recorder,
) -> None:
    """Try the failures among `results` again; a worker lost over it is a finding of its own."""

    def lost(failure: WorkerFailed) -> None:
        entrant.dead.setdefault(regime, f"{failure.kind} ({failure})")
        m, tactic = next(p for p, r in zip(pairs, results, strict=True) if retest.failed(r))
        failed(layer, entrant, m, tactic, regime, data, failure, record)

    retest.retest(entrant.runner, regime, results, lost)
