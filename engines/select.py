"""The one backend an engine should run: named by it, proven in every bucket, fastest over all.

An engine fixes one backend per process, for all its layers; so a backend that is unsafe in one
bucket is out, however fast it is in the others. Standard library only.
"""

from __future__ import annotations

import math
import os

from ..cache import reader as reading
from ..cache.errors import Missing
from . import here, installed, names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..cache.reader import Decision, Reader

NOISE = 0.02
"""Backends within 2 % of the fastest count as equal, and their names decide."""


class Selection:
    """What `engine` should run on `arch`, and why.

    backend    None where nothing that it can name is proven everywhere
    word       what the engine calls it
    proven     every backend that it can name and that is proven everywhere, `backend` among them
    buckets    (n, k, m_lo, m_hi, decision of that backend) for each bucket it is proven in
    rejected   every other backend measured here -> why it is not the one, in one sentence
    default    what the engine would take by itself
    """

    __slots__ = (
        "engine", "arch", "gpu", "profile", "generation", "format", "activation", "backend",
        "word", "proven", "buckets", "rejected", "default", "place", "version", "notes",
    )  # fmt: skip
    engine: str
    arch: str
    gpu: str
    profile: str
    generation: int
    format: str
    activation: str
    backend: str | None
    word: str | None
    proven: tuple[str, ...]
    buckets: list[tuple[int, int, int, int, Decision]]
    rejected: dict[str, str]
    default: str | None
    place: str
    version: str | None
    notes: list[str]

    def __init__(self, **values: Any) -> None:
        for name in self.__slots__:
            setattr(self, name, values[name])

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
) -> Selection:
    """The backend `engine` should run in the generation of `reader`.

    `activation`: ``fp4`` or ``bf16``; None for what the engine computes an FP4 checkpoint with on
    this SM: FP4 activations from SM100 on, 16-bit ones before. Raises Missing where no bucket of
    that kind was probed.
    """
    scope = reader.scope()
    if scope is None:
        raise Missing(reader.path, reader.choose(1, 1, 1).reason)
    arch, gpu, profile = scope
    sm = names.sm_of(arch)
    wanted = activation or ("fp4" if (sm or 0) >= 100 else "bf16")
    rows = [
        row
        for row in reader.rows("choice")
        if (row["arch"], row["gpu"], row["profile"]) == scope
        and (row["format"], row["activation"], row["out_dtype"]) == (format, wanted, out_dtype)
        and row["groups"] == 1
    ]
    if not rows:
        raise Missing(reader.path, f"no {format} problem with {wanted} activations was probed here")
    known = installed.words(engine)
    proven: dict[str, list[tuple[int, int, int, int, Decision]]] = {}
    for row in rows:
        shape = (row["n"], row["k"], format, wanted, out_dtype, 1)
        for decision in reader.alternatives(row["m_hi"], *shape):
            if decision.status == "safe":
                bucket = (row["n"], row["k"], row["m_lo"], row["m_hi"], decision)
                kept = proven.setdefault(decision.backend, [])
                if not any(same[:4] == bucket[:4] for same in kept):
                    kept.append(bucket)
    measured = sorted(
        {
            c["backend"]
            for c in reader.rows("candidate")
            if (c["arch"], c["gpu"], c["profile"]) == scope
            and (c["format"], c["activation"], c["out_dtype"]) == (format, wanted, out_dtype)
        }
        | set(proven)
    )
    rejected: dict[str, str] = {}
    cost: dict[str, float] = {}
    quarantined = {q.backend: q for q in reader.quarantines}
    for backend in measured:
        word = names.named(engine, backend, format, sm)
        missing = len(rows) - len(proven.get(backend, ()))
        own = _own_build(engine, backend, word, measured, format, sm)
        if word is None:
            rejected[backend] = f"{engine} has no name for it on {arch}"
        elif known is not None and word not in known:
            rejected[backend] = f"the installed {engine} does not know {word}"
        elif own is not None:
            rejected[backend] = f"{engine} runs a build of its own, probed as {own}"
        elif missing:
            why = f"it is not proven in {missing} of {len(rows)} buckets"
            if backend in quarantined:
                why += f", and quarantined: {quarantined[backend].reason}"
            rejected[backend] = why
        else:
            cost[backend] = _cost(proven[backend])
    chosen = None
    if cost:
        fastest = min(cost.values())
        chosen = min(b for b, c in cost.items() if c <= fastest * (1 + NOISE))
        for backend in cost.keys() - {chosen}:
            slower = cost[backend] / cost[chosen] - 1
            rejected[backend] = f"{slower:.0%} slower over all buckets (geometric mean)"
    return Selection(
        engine=engine,
        arch=arch,
        gpu=gpu,
        profile=profile,
        generation=reader.generation,
        format=format,
        activation=wanted,
        backend=chosen,
        word=names.named(engine, chosen, format, sm) if chosen else None,
        proven=tuple(sorted(cost)),
        buckets=proven[chosen] if chosen else [],
        rejected=rejected,
        default=next(iter(names.defaults(engine, sm)), None),
        place=os.path.dirname(os.path.abspath(reader.path)) if reader.path else "",
        version=installed.version(engine),
        notes=_notes(engine, chosen, sm),
    )


def _own_build(
    engine: str, backend: str, word: str | None, measured: list[str], fmt: str, sm: int | None
) -> str | None:
    """The backend that is the engine's own build of what `backend` is another's of, if probed."""
    if word is None or engine not in names.NAMES[backend].note:
        return None
    same = (b for b in measured if names.named(engine, b, fmt, sm) == word)
    return next((b for b in same if engine not in names.NAMES[b].note), None)


def _cost(buckets: list[tuple[int, int, int, int, Decision]]) -> float:
    """Geometric mean of the times, microseconds; an empty batch has none."""
    times = [d.median_us for _, _, _, m_hi, d in buckets if d.median_us and m_hi > 0]
    return math.exp(sum(map(math.log, times)) / len(times)) if times else math.inf


def _notes(engine: str, backend: str | None, sm: int | None) -> list[str]:
    found = []
    note = names.NAMES[backend].note.get(engine) if backend else None
    if note:
        found.append(note)
    if engine == "sglang" and sm is not None and 120 <= sm < 130:
        found.append(
            "SGLang tries a kernel of its own first on a few fixed shapes (try_qwen3x_nvfp4_gemm);"
            " it has no off switch and was not probed"
        )
    return found
