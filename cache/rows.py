"""The rows of the store as plain values. Standard library only.

Statuses are checked here, so that no row can say something the design has no word for.
Times `at`, `started` and the like are seconds since 1970 (UTC); the ledger fills them in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..words import EXACT

Json = Any
"""Whatever `json` writes and reads back equal: str, int, finite float, bool, None, list, dict."""

EVIDENCE = ("passed", "failed", "not exercised", "not applicable", "skipped")
VERDICTS = ("safe", "unsafe", "unsupported", "inconclusive")
CHOICES = ("safe", "floor", "none")
AUDITS = ("flagged", "doubtful", "clean", "unknown")
RUNS = ("running", "finished", "failed", "interrupted")


def _one_of(value: str, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r} is not one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class BucketKey:
    """A class of problems that share one choice; m_lo <= m <= m_hi, both included."""

    format: str
    activation: str
    out_dtype: str
    groups: int
    m_lo: int
    m_hi: int
    n: int
    k: int

    def __post_init__(self) -> None:
        if not 0 <= self.m_lo <= self.m_hi:
            raise ValueError(f"m from {self.m_lo} to {self.m_hi} is not a range of m >= 0")

    @property
    def layer(self) -> LayerKey:
        """The layer whose bucket this is."""
        return LayerKey(self.format, self.activation, self.out_dtype, self.groups, self.n, self.k)


@dataclass(frozen=True, slots=True)
class LayerKey:
    """A layer as evidence knows it: every bucket of one (n, k) in one format."""

    format: str
    activation: str
    out_dtype: str
    groups: int
    n: int
    k: int

    def bucket(self, m_lo: int, m_hi: int) -> BucketKey:
        """The bucket of m_lo <= m <= m_hi."""
        return BucketKey(
            self.format, self.activation, self.out_dtype, self.groups, m_lo, m_hi, self.n, self.k
        )


@dataclass(frozen=True, slots=True)
class Where:
    """What evidence is of: one tactic of a backend in one bucket."""

    backend: str
    tactic: str
    bucket: BucketKey


@dataclass(frozen=True, slots=True)
class Under:
    """What a launch was made under: its regime, and the data it was given."""

    regime: str
    data: str = EXACT


class _OfTactic:
    """A row that is of one tactic of a backend in one bucket."""

    __slots__ = ()
    backend: str
    tactic: str
    bucket: BucketKey

    @property
    def where(self) -> Where:
        return Where(self.backend, self.tactic, self.bucket)


Scope = tuple[str, str, str]
"""Architecture, GPU model, profile: what choices are made for."""


class _OfScope:
    """A row that holds for one GPU model under one profile."""

    __slots__ = ()
    arch: str
    gpu: str
    profile: str

    @property
    def scope(self) -> Scope:
        return self.arch, self.gpu, self.profile


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as the local file system knows it: changes when the file is replaced."""

    path: str
    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Environment:
    """What evidence of one backend holds for; made by `fingerprint.environment`."""

    fingerprint: str
    backend: str
    arch: str
    facts: Mapping[str, Json]
    stamps: tuple[Stamp, ...] = ()
    first_seen: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One probe from start to end; `interrupted` when its process died without finishing it."""

    id: str
    started: float
    finished: float | None
    status: str
    seed: int
    level: str
    profile: str
    device: Mapping[str, Json]
    argv: tuple[str, ...]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        _one_of(self.status, RUNS, "run status")


@dataclass(frozen=True, slots=True)
class Evidence(_OfTactic):
    """What one regime showed of one (backend, tactic, bucket).

    `launches` were checked, on `problems` different problems: repeats of one problem are one trial
    against a fault that depends on the data alone.
    """

    run: str
    fingerprint: str
    backend: str
    tactic: str
    bucket: BucketKey
    regime: str
    data: str
    status: str
    launches: int = 0
    problems: int = 0
    width: int | None = None
    seconds: float = 0.0
    detail: Mapping[str, Json] = field(default_factory=dict)
    at: float | None = None
    id: int | None = None

    def __post_init__(self) -> None:
        _one_of(self.status, EVIDENCE, "evidence status")


@dataclass(frozen=True, slots=True)
class Finding(_OfTactic):
    """A check that failed, with what is needed to see it again.

    `problem` is the problem's fields (its m, n and k may lie off the bucket's); `condition` is
    what the engine or the weights must keep to for the finding not to apply, or None.
    """

    run: str
    fingerprint: str
    backend: str
    tactic: str
    bucket: BucketKey
    problem: Mapping[str, Json]
    kind: str
    regime: str
    data: str
    seed: int
    launch: int | None = None
    condition: Json = None
    detail: Mapping[str, Json] = field(default_factory=dict)
    at: float | None = None
    id: int | None = None


@dataclass(frozen=True, slots=True)
class Timing(_OfTactic):
    """Time per call in microseconds: the median and an interval around it, and the host's part."""

    run: str
    fingerprint: str
    backend: str
    tactic: str
    bucket: BucketKey
    median_us: float
    lo_us: float
    hi_us: float
    samples: int
    host_us: float | None = None
    detail: Mapping[str, Json] = field(default_factory=dict)
    at: float | None = None
    id: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict(_OfTactic):
    """What was decided of one (backend, tactic, bucket) under a profile, and why."""

    run: str
    fingerprint: str
    backend: str
    tactic: str
    bucket: BucketKey
    profile: str
    status: str
    conditions: tuple[Json, ...] = ()
    reasons: tuple[str, ...] = ()
    bounds: Mapping[str, Json] = field(default_factory=dict)
    """By regime: launches, problems, failures, and the upper bound of the failure rate."""
    at: float | None = None
    id: int | None = None

    def __post_init__(self) -> None:
        _one_of(self.status, VERDICTS, "verdict")


@dataclass(frozen=True, slots=True)
class Build:
    """What compiling one backend took, in seconds."""

    run: str
    backend: str
    seconds: float
    detail: Mapping[str, Json] = field(default_factory=dict)
    at: float | None = None
    id: int | None = None


@dataclass(frozen=True, slots=True)
class Probed:
    """A layer that a run brought to its end on one device: written when all of it is committed.

    `bucket` spans every m. `method` is the digest of the code that made the evidence; `detail` has
    ``samples`` (of each time), ``again`` (whether what was known did not count), and by backend
    under ``entrants`` how it was measured and which runs hold its evidence. `autotune.known` writes
    and reads it.
    """

    run: str
    bucket: BucketKey
    device: Mapping[str, Json]
    method: str
    detail: Mapping[str, Json]
    at: float | None = None
    id: int | None = None


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step of a layer that one backend finished: written with what the step recorded, as one.

    `bucket` spans every m. `what` is the step's name, `detail` what the next run needs to go on
    after it; the first, ``begun``, says how the backend is measured there, as `Probed` does.
    """

    run: str
    fingerprint: str
    backend: str
    bucket: BucketKey
    what: str
    detail: Mapping[str, Json] = field(default_factory=dict)
    at: float | None = None
    id: int | None = None


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was taken back, and why: the rows of a run, a backend or a layer, as far as they are
    named, or one finding with what rests on it. `rows` are by table: the newest id that this holds
    for, or the ids of a finding's."""

    reason: str
    run: str | None = None
    backend: str | None = None
    n: int | None = None
    k: int | None = None
    finding: int | None = None
    rows: Mapping[str, Json] = field(default_factory=dict)
    at: float | None = None
    id: int | None = None

    @property
    def what(self) -> str:
        """What was taken back, in words."""
        if self.finding is not None:
            return f"finding {self.finding} of {self.backend}"
        layer = None if self.n is None else f"{self.n},{self.k}"
        named = {"backend": self.backend, "layer": layer, "run": self.run}
        return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)

    def covers(self, table: str, row: Mapping[str, Any]) -> bool:
        """Whether a row of `table` is taken back. Of a layer that is done, one backend's part can
        be: see `without_forgotten`."""
        if not self._held(table, row["id"]) or (table == "probed" and self.backend is not None):
            return False
        if self.finding is not None:
            return True
        named = {"run": self.run, "backend": self.backend, "n": self.n, "k": self.k}
        return all(row.get(name) == value for name, value in named.items() if value is not None)

    def part(self, row: Probed, backend: str) -> bool:
        """Whether a backend's part of a layer that is done rests on what is taken back."""
        runs = (row.run, *row.detail["entrants"][backend]["runs"])
        return (
            self._held("probed", row.id or 0)
            and self.backend in (None, backend)
            and self.n in (None, row.bucket.n)
            and self.k in (None, row.bucket.k)
            and (self.run is None or self.run in runs)
        )

    def _held(self, table: str, number: int) -> bool:
        held = self.rows.get(table)
        return number in held if isinstance(held, list) else number <= int(held or 0)


def without_forgotten(row: Probed, taken_back: Sequence[Forgotten]) -> Probed:
    """A layer that is done, without the backends of which something was taken back since."""
    entrants = row.detail["entrants"]
    left = {
        name: how
        for name, how in entrants.items()
        if not any(each.part(row, name) for each in taken_back)
    }
    return row if left == entrants else replace(row, detail={**row.detail, "entrants": left})


@dataclass(frozen=True, slots=True)
class Audit:
    """What static inspection said of one compiled module; it belongs to no run.

    `content` identifies the file's bytes and what it was judged by, `digest` its machine code (as
    `codedigest` has it). `sm` is the SM that was asked about, None for all there is code for.
    """

    content: str | None
    module: str
    path: str | None
    sm: int | None
    verdict: str
    authority: str
    pdl: str
    backend: str | None = None
    digest: str | None = None
    remedy: str | None = None
    evidence: tuple[str, ...] = ()
    at: float | None = None
    id: int | None = None

    def __post_init__(self) -> None:
        _one_of(self.verdict, AUDITS, "audit verdict")


@dataclass(frozen=True, slots=True)
class Choice(_OfScope):
    """The backend for one bucket on one GPU model under one profile.

    `status`: ``safe`` was proven; ``floor``: nothing faster was, so the floor; ``none``: not even
    the floor can be used. `default_backend` is what the engine would take by itself; its verdict
    and times are its `Candidate` row.
    """

    arch: str
    gpu: str
    profile: str
    bucket: BucketKey
    backend: str
    tactic: str
    layout: str
    status: str
    conditions: tuple[Json, ...] = ()
    median_us: float | None = None
    launches: int = 0
    problems: int = 0
    fingerprint: str | None = None
    default_backend: str | None = None
    bounds: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of(self.status, CHOICES, "choice status")


@dataclass(frozen=True, slots=True)
class Candidate(_OfTactic, _OfScope):
    """One that competed for a bucket. `rank` orders those that may be chosen, 0 first; None: never.

    Inside one layout the reader takes the lowest rank, so an engine that fixed a layout when its
    weights loaded gets that layout's best.
    """

    arch: str
    gpu: str
    profile: str
    bucket: BucketKey
    backend: str
    tactic: str
    layout: str
    verdict: str
    rank: int | None = None
    median_us: float | None = None
    lo_us: float | None = None
    hi_us: float | None = None
    launches: int = 0
    problems: int = 0
    width: int | None = None
    conditions: tuple[Json, ...] = ()
    reasons: tuple[str, ...] = ()
    fingerprint: str | None = None
    bounds: Mapping[str, Json] = field(default_factory=dict)
    """Of its compiled kernel, by regime: launches, problems, failures, and the upper bound."""

    def __post_init__(self) -> None:
        _one_of(self.verdict, VERDICTS, "verdict")

    @property
    def place(self) -> tuple[Scope, BucketKey, str]:
        """Where it competes, and as whom: a newer candidate of the same place replaces it."""
        return self.scope, self.bucket, self.backend


@dataclass(frozen=True, slots=True)
class Layer(_OfScope):
    """The weight layout for one (n, k), chosen once for all m: what weights are prepared as.

    `expected_us` is the time per call over the profile's distribution of m.
    """

    arch: str
    gpu: str
    profile: str
    format: str
    activation: str
    out_dtype: str
    groups: int
    n: int
    k: int
    layout: str
    expected_us: float | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One publication of choices.db. `status`: ``writing``, ``published`` or ``abandoned``."""

    number: int
    at: float
    status: str
    origin: str
    digest: str | None
