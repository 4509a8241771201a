"""The one backend an engine should run: named by it, proven in every bucket, fastest over all.

An engine fixes one backend per process for all its linear layers, and one for all its routed
experts; so a backend that is unsafe in one bucket is out, however fast it is in the others.
Standard library only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..cache import reader as reading
from ..cache.decision import Decision
from ..cache.errors import Missing
from ..cache.experts import SingleBackend, gates_of, of_meta, option_text, single_backends
from ..cache.reader import Reader
from ..errors import Refused
from . import here, holding, installed, names, stack
from .asked import Configured, LayerKind, NotTaken, Unclear
from .holding import Held
from .installed import EngineHome

NOISE = 0.02
"""Backends within 2 % of the fastest, or told apart from it in no bucket, count as equal, and their
names decide."""

_MOST_MODELS = 8
"""Names of models in a note."""

Bucket = tuple[int, int, int, int, Decision]
"""(n, k, m_lo, m_hi, decision)"""


@dataclass(frozen=True, slots=True)
class ExpertsAsked:
    """The routed experts a selection is for: their format and gate, and their rows' (activation,
    groups, n, k); and what one backend for all of them costs.

    traffic   the distribution of tokens that times are expected over; None where nothing was
              published of all these layers
    singles   the backends that may be chosen for all of them, best first
    """

    format: str
    gate: str
    layers: frozenset[tuple[str, int, int, int]]
    traffic: str | None = None
    singles: tuple[SingleBackend, ...] = ()

    @property
    def options(self) -> list[str]:
        """The layers as ``--experts`` has them."""
        named = ("activation", "groups", "n", "k")
        found = (option_text(dict(zip(named, key, strict=True))) for key in sorted(self.layers))
        return [text for text in found if text]

    def of(self, backend: str | None) -> SingleBackend | None:
        """What one backend for all costs; None where that was not published."""
        return next((each for each in self.singles if each.backend == backend), None)


@dataclass(frozen=True, slots=True)
class Selection:
    """What an engine should run on `arch`, and why.

    backend    None where nothing that it can name is proven everywhere
    word       what the engine calls it
    setting    what makes it run that: arguments and environment
    held       what holds it to the proven tactics
    proven     every backend that it can name and that is proven everywhere, `backend` among them
    buckets    (n, k, m_lo, m_hi, decision of that backend) for each bucket it is proven in
    others     backend -> its buckets, for the other proven ones
    rejected   every other backend measured here -> why it is not the one, in one sentence
    unclear    backends that are proven and not in `proven` because what the engine makes of them
               cannot be told, or because they were measured on other versions
    default    what the engine would take by itself; None where that is not known
    experts    where it is for routed experts: which, and what one backend for all costs
    """

    home: EngineHome
    arch: str
    gpu: str
    profile: str
    generation: int
    format: str
    activation: str
    backend: str | None
    word: str | None
    setting: Configured
    held: Held | None
    proven: tuple[str, ...]
    buckets: list[Bucket]
    others: dict[str, list[Bucket]]
    rejected: dict[str, str]
    unclear: tuple[str, ...]
    default: str | None
    place: str
    notes: list[str] = field(default_factory=list)
    experts: ExpertsAsked | None = None

    @property
    def engine(self) -> str:
        return self.home.engine

    @property
    def version(self) -> str | None:
        return self.home.version

    @property
    def kind(self) -> LayerKind:
        gate = self.experts.gate if self.experts else None
        return LayerKind(names.sm_of(self.arch) or 0, self.format, self.activation, gate)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(n, k) of every layer that was measured."""
        return sorted({(n, k) for n, k, *_ in self.buckets})

    @property
    def conditions(self) -> list[dict[str, str]]:
        """What the verdicts demand of weights and engine, each once."""
        found = {c["id"]: c for *_, d in self.buckets for c in d.conditions}
        return [found[key] for key in sorted(found)]


def open_for(
    engine: str,
    state: str | os.PathLike[str] | None = None,
    *,
    pin: bool = False,
    arch: str | None = None,
    gpu: str | None = None,
    profile: str | None = None,
) -> Reader:
    """A reader of what was probed for `engine` on this machine's GPU: under the profile of the
    engine's name, else under ``strict``, which asks for more.

    Raises StateError: Missing where nothing was, or where the GPUs here are of several kinds.
    """
    found = here.gpus() if arch is None and gpu is None else []
    if found:
        if len(found) > 1:
            raise Missing("choices.db", "the GPUs here are of several kinds: say which gpu")
        ((arch, gpu),) = found
    last = None
    for name in (profile,) if profile else (engine, "strict"):
        last = reading.open(state, pin=pin, arch=arch, gpu=gpu, profile=name)
        if last.scope() is not None:
            return last
    assert last is not None
    raise Missing(last.path, last.choose(1, 1, 1).reason)


def select(
    reader: Reader,
    engine: str,
    *,
    format: str = "nvfp4",
    activation: str | None = None,
    out_dtype: str = "bf16",
    home: EngineHome | None = None,
) -> Selection:
    """The backend `engine` should run in the generation of `reader`.

    `activation`: ``fp4`` or ``bf16``; None for what the engine computes an FP4 checkpoint with on
    this SM: FP4 activations from SM100 on, 16-bit ones before, and where all that was probed is
    W4A16. `home`: where the engine is installed, by default beside this. Raises Missing where no
    bucket of that kind was probed, and Refused where the engine is not installed.
    """
    where = (home or installed.home(engine)).required()
    scope = reader.scope()
    if scope is None:
        raise Missing(reader.path, reader.choose(1, 1, 1).reason)
    sm = names.sm_of(scope[0])
    usual = "fp4" if (sm or 0) >= 100 else "bf16"
    kind = LayerKind(sm or 0, format, activation or usual)
    rows = _dense_rows(reader, "choice", kind, out_dtype)
    if not rows and activation is None and usual == "fp4":
        # A checkpoint that is W4A16 is served as W4A16, whatever the GPU could do.
        kind = replace(kind, activation="bf16")
        rows = _dense_rows(reader, "choice", kind, out_dtype)
    wanted = activation or (kind.activation if rows else usual)
    if not rows:
        raise Missing(reader.path, f"no {format} problem with {wanted} activations was probed here")
    return _selected(reader, where, kind, (rows, _dense_rows(reader, "candidate", kind, out_dtype)))


def select_experts(
    reader: Reader,
    engine: str,
    *,
    format: str | None = None,
    layers: Collection[str] = (),
    home: EngineHome | None = None,
) -> Selection:
    """The backend `engine` should run routed experts with, likewise: those in `layers`, as
    ``--experts`` has them, else all of one kind that were probed, in `format` where one is named.

    Raises Missing where none were probed, and Refused where they are of several kinds, which no
    model has, or where the engine is not installed.
    """
    where = (home or installed.home(engine)).required()
    scope = reader.scope()
    if scope is None:
        raise Missing(reader.path, reader.choose(1, 1, 1).reason)
    asked = _experts_asked(reader, scope, format, layers)
    sm = names.sm_of(scope[0]) or 0
    # What they are computed with on this SM: rows of routed experts are layers, bf16 in and out.
    kind = LayerKind(sm, asked.format, "fp4" if sm >= 100 else "bf16", asked.gate)
    asked = _with_costs(asked, reader, scope, _engine_default(where, kind))
    rows = tuple(_expert_rows(reader, table, scope, asked) for table in ("choice", "candidate"))
    return _selected(reader, where, kind, rows, asked)


def parts(reader: Reader, engine: str, home: EngineHome | None = None) -> list[Selection]:
    """The selections of all that was probed: of linear layers, then of routed experts. Raises
    Missing where neither was, and Refused as the two do."""
    found = []
    missing = None
    for one in (select, select_experts):
        try:
            found.append(one(reader, engine, home=home))
        except Missing as error:
            missing = missing or error
    if missing is not None and not found:
        raise missing
    return found


def _experts_asked(
    reader: Reader, scope: tuple[str, str, str], format: str | None, layers: Collection[str]
) -> ExpertsAsked:
    """Which routed experts are meant. Raises Missing, Refused."""
    found = [
        row
        for row in reader.rows("choice")
        if (row["arch"], row["gpu"], row["profile"]) == scope
        and row["groups"] > 1
        and format in (None, row["format"])
    ]
    if layers:
        wanted = set(layers)
        known = {option_text(row) for row in found}
        if missing := sorted(wanted - known):
            raise Missing(
                reader.path, f"no routed experts {' and '.join(missing)} were probed here"
            )
        found = [row for row in found if option_text(row) in wanted]
    kinds = gates_of(found)
    if not kinds:
        raise Missing(
            reader.path, f"no {f'{format} ' if format else ''}routed experts were probed here"
        )
    if len(kinds) > 1:
        several = ", ".join(" ".join(kind) for kind in kinds)
        raise Refused(
            f"routed experts of several kinds were probed here ({several}), and a model has one: "
            "name it with --checkpoint, or its layers with --experts and --format"
        )
    keys = frozenset((r["activation"], r["groups"], r["n"], r["k"]) for r in found)
    return ExpertsAsked(*kinds[0], keys)


def _with_costs(
    asked: ExpertsAsked, reader: Reader, scope: tuple[str, str, str], default: str | None
) -> ExpertsAsked:
    """With what one backend for all costs, where that was published of each layer."""
    mine = []
    for each in of_meta(reader.meta):
        key = (each.layer.activation, each.layer.groups, each.layer.n, each.layer.k)
        if each.scope == scope and each.layer.format == asked.format and key in asked.layers:
            mine.append(each)
    if not mine or len(mine) != len(asked.layers):
        return asked
    return replace(asked, traffic=mine[0].traffic, singles=tuple(single_backends(mine, default)))


def _expert_rows(
    reader: Reader, table: str, scope: tuple[str, str, str], asked: ExpertsAsked
) -> list[dict[str, Any]]:
    return [
        row
        for row in reader.rows(table)
        if (row["arch"], row["gpu"], row["profile"]) == scope
        and row["format"] == asked.format
        and (row["activation"], row["groups"], row["n"], row["k"]) in asked.layers
    ]


def _selected(
    reader: Reader,
    where: EngineHome,
    kind: LayerKind,
    rows: Sequence[list[dict[str, Any]]],
    asked: ExpertsAsked | None = None,
) -> Selection:
    """The selection among the rows of these buckets: of their choices, and of their candidates."""
    scope = reader.scope()
    assert scope is not None
    engine, sm, format = where.engine, kind.sm, kind.format
    chosen_rows, candidate_rows = rows
    proven = _proven(reader, chosen_rows)
    measured = sorted({row["backend"] for row in candidate_rows} | set(proven))
    trial = _Trial(where, kind, reader, proven, len(chosen_rows))
    rejected: dict[str, str] = {}
    able: dict[str, tuple[Configured, Held]] = {}
    unclear = []
    for backend in measured:
        try:
            able[backend] = trial.of(backend, measured)
        except NotTaken as error:
            rejected[backend] = str(error)
        except Unclear as error:
            rejected[backend] = str(error)
            unclear.append(backend)
    chosen, cost = _fastest(proven, able, candidate_rows, asked)
    for backend in able.keys() - {chosen}:
        slower = cost[backend] / cost[chosen or ""] - 1
        over = "over all buckets (geometric mean)"
        if asked is not None and asked.of(backend) is not None:
            over = f"over the traffic {asked.traffic}"
        rejected[backend] = f"{slower:.0%} slower {over}"
    return Selection(
        home=where,
        arch=scope[0],
        gpu=scope[1],
        profile=scope[2],
        generation=reader.generation,
        format=format,
        activation=kind.activation,
        backend=chosen,
        word=names.named(engine, chosen, format, sm) if chosen else None,
        setting=able[chosen][0] if chosen else Configured(),
        held=able[chosen][1] if chosen else None,
        proven=tuple(sorted(able)),
        buckets=proven[chosen] if chosen else [],
        others={b: proven[b] for b in able if b != chosen},
        rejected=rejected,
        unclear=tuple(unclear),
        default=_engine_default(where, kind),
        place=os.path.dirname(os.path.abspath(reader.path)) if reader.path else "",
        notes=_notes(where, kind, chosen),
        experts=asked,
    )


def _fastest(
    proven: Mapping[str, list[Bucket]],
    able: Collection[str],
    candidates: list[dict[str, Any]],
    asked: ExpertsAsked | None,
) -> tuple[str | None, dict[str, float]]:
    """The one of `able` to run, and what each of them costs, microseconds. Routed experts are
    weighed as they were published; without that, and linear layers, by the geometric mean."""
    if asked is not None and all(asked.of(backend) for backend in able):
        found = [each for each in asked.singles if each.backend in able]
        cost = {each.backend: each.expected_us for each in found}
        return (found[0].backend if found else None), cost
    cost = {backend: _cost(proven[backend]) for backend in able}
    if not cost:
        return None, cost
    fastest = min(cost, key=lambda b: (cost[b], b))
    spans = _intervals_by_backend(candidates)
    return min(
        b
        for b, c in cost.items()
        if c <= cost[fastest] * (1 + NOISE) or not _told_apart_anywhere(spans, b, fastest)
    ), cost


class _Trial:
    """What may be said against each backend, in the order it is looked at."""

    def __init__(
        self,
        home: EngineHome,
        kind: LayerKind,
        reader: Reader,
        proven: Mapping[str, list[Bucket]],
        buckets: int,
    ) -> None:
        self._home = home
        self._kind = kind
        self._proven = proven
        self._buckets = buckets
        self._quarantined = {q.backend: q.reason for q in reader.quarantines}
        self._versions = stack.measured(reader.rows("environment"))

    def of(self, backend: str, measured: list[str]) -> tuple[Configured, Held]:
        """What makes the engine run it, tactics and all. Raises NotTaken, Unclear."""
        home, kind = self._home, self._kind
        word = names.named(home.engine, backend, kind.format, kind.sm)
        if word is None:
            raise NotTaken(f"{home.engine} has no name for it on sm{kind.sm}")
        own = _own_build(home.engine, backend, word, measured, kind)
        if own is not None:
            raise NotTaken(f"{home.engine} runs a build of its own, probed as {own}")
        buckets = self._proven.get(backend, [])
        if missing := self._buckets - len(buckets):
            why = f"it is not proven in {missing} of {self._buckets} buckets"
            if backend in self._quarantined:
                why += f", and quarantined: {self._quarantined[backend]}"
            raise NotTaken(why)
        for print_ in {d.fingerprint for *_, d in buckets}:
            wrong = stack.made_on_others(self._versions.get(print_ or "", {}), home)
            if wrong:
                raise Unclear(wrong)
        setting = home.source.setting(word, kind)
        held = holding.holding(home, backend, [d for *_, d in buckets], setting)
        return setting.with_args(held.args), held


def _dense_rows(
    reader: Reader, table: str, kind: LayerKind, out_dtype: str
) -> list[dict[str, Any]]:
    """The dense problems of that kind in the scope of `reader`."""
    scope = reader.scope()
    return [
        row
        for row in reader.rows(table)
        if (row["arch"], row["gpu"], row["profile"]) == scope
        and (row["format"], row["activation"]) == (kind.format, kind.activation)
        and (row["out_dtype"], row["groups"]) == (out_dtype, 1)
    ]


def _proven(reader: Reader, rows: list[dict[str, Any]]) -> dict[str, list[Bucket]]:
    """Backend to the buckets it is proven in."""
    proven: dict[str, list[Bucket]] = {}
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        shape = tuple(
            row[name] for name in ("n", "k", "format", "activation", "out_dtype", "groups")
        )
        for decision in reader.alternatives(row["m_hi"], *shape):
            place = (decision.backend, *shape, row["m_lo"])
            if decision.status == "safe" and place not in seen:
                seen.add(place)
                bucket = (row["n"], row["k"], row["m_lo"], row["m_hi"], decision)
                proven.setdefault(decision.backend, []).append(bucket)
    return proven


def _own_build(
    engine: str, backend: str, word: str, measured: list[str], kind: LayerKind
) -> str | None:
    """The backend that is the engine's own build of what `backend` is another's of, if probed."""
    if not _has_note(engine, backend):
        return None
    same = (b for b in measured if names.named(engine, b, kind.format, kind.sm) == word)
    return next((b for b in same if not _has_note(engine, b)), None)


def _has_note(engine: str, backend: str) -> bool:
    """Whether a verdict of the backend does not cover all that the engine means by it."""
    name = names.entry_of(backend)
    return name is not None and engine in name.note


def _engine_default(home: EngineHome, kind: LayerKind) -> str | None:
    """What the engine takes by itself."""
    try:
        word = home.source.runs(kind, Configured())
    except (NotTaken, Unclear):
        return None
    experts = kind.gate is not None
    return names.backend_of(home.engine, word, kind.format, kind.sm, experts) or word


def _cost(buckets: list[Bucket]) -> float:
    """Geometric mean of the times, microseconds; an empty batch has none."""
    times = [d.median_us for _, _, _, m_hi, d in buckets if d.median_us and m_hi > 0]
    return math.exp(sum(map(math.log, times)) / len(times)) if times else math.inf


Spans = dict[str, dict[tuple[int, int, int], tuple[float, float]]]
"""Backend -> (n, k, m_lo) -> the interval of its time, microseconds."""


def _intervals_by_backend(rows: list[dict[str, Any]]) -> Spans:
    """The intervals of all that was timed, an empty batch aside."""
    found: Spans = {}
    for row in rows:
        if row["m_hi"] > 0 and row["lo_us"] is not None and row["hi_us"] is not None:
            place = (row["n"], row["k"], row["m_lo"])
            found.setdefault(row["backend"], {})[place] = (row["lo_us"], row["hi_us"])
    return found


def _told_apart_anywhere(spans: Spans, slower: str, faster: str) -> bool:
    """Whether any bucket tells these two apart. True where their intervals are not known."""
    mine, other = spans.get(slower, {}), spans.get(faster, {})
    both = mine.keys() & other.keys()
    return not both or any(
        mine[place][0] > other[place][1] or other[place][0] > mine[place][1] for place in both
    )


def _notes(home: EngineHome, kind: LayerKind, backend: str | None) -> list[str]:
    name = names.entry_of(backend) if backend else None
    found = [name.note[home.engine]] if name is not None and home.engine in name.note else []
    found += home.source.notes(kind) if kind.gate is None else []
    overrides = home.source.overrides if kind.gate is None else home.source.experts.overrides
    if overrides:
        more = len(overrides) - _MOST_MODELS
        models = ", ".join(overrides[:_MOST_MODELS]) + (f" and {more} more" if more > 0 else "")
        found.append(
            f"{home.engine} sets its backend itself, where it is left at auto, for {models}"
        )
    return found
