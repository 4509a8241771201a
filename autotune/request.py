"""From what a person asked for to the problems and backends of a probe."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..machine.devices import Target
from ..machine.hardware import hardware
from ..machine.memory import free_memory, readable
from ..probes import registry
from ..probes.grouped.problem import ExpertsProblem, parse_experts
from ..probes.grouped.shapes import grouped_layers
from ..probes.models import shapes
from ..probes.models.rows import CheckpointLayers
from ..probes.models.shapes import AskedLayer
from ..probes.problem import ACTIVATIONS, Problem
from .choice.rank import DENSE_FLOORS, FLOORS
from .keys import bucket_key
from .verdict.buckets import edge_of
from .verdict.profiles import PROFILES

DEFAULT_PRESET = {"cuda": "llama-3.1-8b", "cpu": "qwen3-0.6b"}
DEFAULT_FORMATS = ("nvfp4",)
DEFAULT_MAX_M = {"cuda": 4096, "cpu": 32}
"""Enough for decode and chunked prefill on a GPU; on a CPU what takes a minute."""
_WEIGHT_BYTES, _ROW_BYTES = 16, 16
"""Bytes that checking takes at least for each element of a weight, and of a row of activations and
outputs: two weights and their reference, 15.4 to 17.3 measured with torch 2.13 on a CPU."""
A_DAY = 86400.0
MOST_M = 65536
"""A pool of more rows would not fit beside the weights of today's models."""


def layers(
    presets: Sequence[str],
    model_config: Path | None,
    given: Sequence[str],
    tp: int,
    device: str,
    checkpoint: CheckpointLayers | None = None,
) -> list[AskedLayer]:
    """What to probe: all that was named, else the device's default preset; nothing twice.

    Raises ValueError, one sentence; where a model has no dense FP4 layer, that one.
    """
    if tp < 1:
        raise ValueError(f"--tp {tp}: tensor parallelism is at least 1")
    asked = models(presets, model_config, tp, checkpoint)
    if not asked and not given:
        asked = [shapes.preset_layers(DEFAULT_PRESET[device], tp)]
    # A model that is FP4 in its routed experts alone has no dense layer to name.
    dense = [model for model in asked if model.probed or not grouped_layers(model, 1)]
    return list(shapes.asked(dense, given))


def models(
    presets: Sequence[str],
    model_config: Path | None,
    tp: int,
    checkpoint: CheckpointLayers | None = None,
) -> list[CheckpointLayers]:
    """The models that were named. Raises ValueError, one sentence."""
    found = [shapes.preset_layers(name, tp) for name in presets]
    if model_config is not None:
        found.append(shapes.config_layers(model_config, tp))
    return found if checkpoint is None else [*found, checkpoint]


def problems(
    layers: Iterable[AskedLayer],
    formats: Sequence[str],
    activations: Sequence[str],
    out_dtype: str,
    max_m: int,
) -> tuple[Problem, ...]:
    """One problem a layer, format and activation, at the upper edge of `max_m`'s bucket.

    `formats` and `activations` are those asked for; empty: NVFP4, and both. Of a layer with a
    format of its own they leave out what they do not name. Raises ValueError, one sentence.
    """
    if not 1 <= max_m <= MOST_M:
        raise ValueError(f"--max-m {max_m}: it must be from 1 to {MOST_M}")
    asked = list(layers)
    wanted = formats or DEFAULT_FORMATS
    own = [layer.format for layer in asked if layer.format is not None]
    found = [
        Problem(format_, edge_of(max_m), layer.n, layer.k, activation, out_dtype)
        for format_ in dict.fromkeys((*wanted, *(() if formats else own)))
        for activation in activations or ACTIVATIONS
        for layer in asked
        if layer.format is not None or format_ in wanted
        if layer.takes(format_, activation)
    ]
    if not found:
        first = asked[0]
        raise ValueError(
            f"nothing is left of the checkpoint's layers: {first.name} is {first.format} with "
            f"{first.activation} activations, and that was not asked for"
        )
    return tuple(dict.fromkeys(found))


def fits(problems: Iterable[Problem], target: Target) -> None:
    """Raise ValueError, one sentence, for a layer that cannot be checked in the memory of `target`,
    whichever backend is asked."""
    on_cpu = target.device.kind == "cpu"
    room = free_memory() if on_cpu else hardware(target.uuid).get("memory_bytes")
    if room is None:
        return
    for p in problems:
        least = _WEIGHT_BYTES * _elements_at_once(p) + _ROW_BYTES * p.m * (p.n + p.k)
        if least > room:
            raise ValueError(
                f"a layer with n={p.n} and k={p.k} takes {readable(least)} to check up to m={p.m}, "
                f"and {target.name} has {readable(room)}: probe it where there is more, or ask for "
                "a smaller shape or --max-m"
            )


def _elements_at_once(p: Problem) -> int:
    """FP4 elements of a layer that are dequantised at once, about: of routed experts few are."""
    return p.parameters // 4 if isinstance(p, ExpertsProblem) else p.n * p.k


def experts(
    given: Sequence[str],
    formats: Sequence[str],
    named: Sequence[CheckpointLayers],
    tokens: int,
    ep: int = 1,
) -> tuple[ExpertsProblem, ...]:
    """The layers of routed experts that were typed in, E,TOP_K,INTERMEDIATE,HIDDEN each, in the
    formats asked for (empty: NVFP4), and those of the models that were named, spread over `ep`
    ranks.

    Raises ValueError, one sentence.
    """
    if not 1 <= tokens <= MOST_M:
        raise ValueError(f"--max-m {tokens}: it must be from 1 to {MOST_M}")
    found = []
    for text in given:
        groups, top_k, n, k, gate, scaling = parse_experts(text)
        for format_ in formats or DEFAULT_FORMATS:
            found.append(
                ExpertsProblem(
                    format_,
                    edge_of(tokens),
                    n,
                    k,
                    groups=groups,
                    top_k=top_k,
                    gate=gate,
                    scaling=scaling,
                )
            )
    for model in named:
        own = grouped_layers(model, edge_of(tokens), ep)
        found += [p for p in own if not formats or p.format in formats]
    return tuple(dict.fromkeys(found))


def backends_for(wanted: Sequence[str], problems: Sequence[Problem]) -> tuple[str, ...]:
    """The backends to ask about these problems: those wanted, or every one that computes such."""
    if wanted:
        return backends(wanted)
    dense = backends(()) if any(p.groups == 1 for p in problems) else plugins()
    grouped = registry.experts_names() if any(p.groups > 1 for p in problems) else []
    return tuple(dict.fromkeys((*dense, *grouped)))


def everyone() -> tuple[str, ...]:
    """Every backend known here, and those of routed experts."""
    return (*registry.names(), *registry.experts_names())


def plugins() -> tuple[str, ...]:
    """Installed backends that are not ours: what they compute is theirs to say."""
    return tuple(name for name in registry.names() if name not in registry.BUILTIN)


def backends(wanted: Sequence[str]) -> tuple[str, ...]:
    """The backends to ask: those wanted, or every one known here.

    A name nobody knows raises ValueError; whether a known one loads is for its worker to say.
    """
    if not wanted:
        return tuple(registry.names())
    for name in wanted:
        registry.known(name)
    return tuple(dict.fromkeys(wanted))


def seed(given: int | None) -> int:
    """The seed given, or a fresh one; either is printed."""
    if given is not None and given < 0:
        raise ValueError(f"--seed {given}: a seed is not negative")
    return secrets.randbits(32) if given is None else given


def max_m(given: int | None, target: Target) -> int:
    return DEFAULT_MAX_M[target.device.kind] if given is None else given


def hang_seconds(given: float | None) -> float | None:
    """The silence given, checked to be some and at most a day; None for the device's default."""
    if given is not None and not 0 < given <= A_DAY:
        raise ValueError(f"--hang-seconds {given:g}: it must be more than 0 and at most {A_DAY:g}")
    return given


def failure_rate(rate: float | None, confidence: float) -> float | None:
    """The rate to bound, checked together with its confidence; None for the level's."""
    if rate is not None and not 0 < rate < 1:
        raise ValueError(f"--max-failure-rate {rate:g}: a rate is between 0 and 1")
    if not 0 < confidence < 1:
        raise ValueError(f"--confidence {confidence:g}: a confidence is between 0 and 1")
    return rate


def budget(seconds: float, launches: int | None) -> None:
    """Check what may be spent on a failure rate. Raises ValueError, one sentence."""
    if not seconds >= 0:
        raise ValueError(f"--max-seconds {seconds:g}: it must not be negative")
    if launches is not None and launches < 1:
        raise ValueError(f"--max-launches {launches}: it must be at least 1")


def time_budget(seconds: float | None) -> float | None:
    """The seconds a probe may take, checked to be some; None for what it needs."""
    if seconds is not None and not seconds > 0:
        raise ValueError(f"--budget {seconds:g}: it must be more than 0")
    return seconds


def interpreter(python: str | None) -> str | None:
    """The interpreter to run workers in, checked to be one; None for this one.

    Raises ValueError, one sentence.
    """
    if python is None:
        return None
    found = shutil.which(python)
    if found is None:
        raise ValueError(f"--python {python!r}: there is no such program")
    return found


def prior(
    found: Sequence[str], profile: str, sm: int | None, problems: Sequence[Problem] = ()
) -> tuple[str, ...]:
    """The backends to verify in place of all: those `found`, which the fleet chose, the engine's
    defaults for these problems, so that no choice is slower than those, and the floors. Empty,
    which is all, where the fleet's choices do not cover the layers.
    """
    there = {*registry.names(), *registry.experts_names()}
    known = [name for name in found if name in there]
    if len(known) < len(found) or not known:
        return ()
    usual: list[str | None] = []
    if profile in PROFILES:
        mine = PROFILES[profile]
        usual = [mine.default(sm), *(mine.default_of(sm, bucket_key(p)) for p in problems)]
    grouped = any(p.groups > 1 for p in problems)
    floors = FLOORS if grouped else DENSE_FLOORS
    defaults = [name for name in usual if name in there]
    return tuple(dict.fromkeys((*known, *(d for d in defaults if d), *floors)))
