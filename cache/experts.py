"""Routed experts among published rows: what each backend takes over a layer, and what one backend
for a whole model loses. Standard library only.

The *oracle* takes the fastest backend that may be chosen in each bucket of each layer. Engines take
one backend for all experts of a model; what that loses against the oracle is a share of the
expected time of a call over a distribution of tokens, all layers added up.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..words import experts_key
from .measured import Measured, in_order
from .rows import LayerKey, Scope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

META = "experts"
"""Where a publication says it."""


@dataclass(frozen=True, slots=True)
class ExpertsLayer:
    """One layer of routed experts over a distribution of tokens.

    scope      architecture, GPU model and profile
    traffic    the distribution's name; `covered` is the share of it that was probed
    oracle_us  the expected time of a call by the fastest of each bucket; None where a bucket with a
               share has nothing that may be chosen
    times      the expected time of each backend that may be chosen in every such bucket
    """

    scope: Scope
    layer: LayerKey
    traffic: str
    covered: float
    oracle_us: float | None
    times: Mapping[str, Measured]

    def json(self) -> dict[str, Any]:
        """As `of_json` takes it."""
        named = dict(zip(("arch", "gpu", "profile"), self.scope, strict=True))
        times = {name: [t.us, t.lo, t.hi] for name, t in sorted(self.times.items())}
        numbers = {"covered": self.covered, "oracle_us": self.oracle_us, "backends": times}
        return {**named, **asdict(self.layer), "traffic": self.traffic, **numbers}


@dataclass(frozen=True, slots=True)
class SingleBackend:
    """One backend for all: its expected microseconds, and by how many percent that is more than
    the oracle's."""

    backend: str
    expected_us: float
    loss_percent: float

    def json(self) -> dict[str, Any]:
        return asdict(self)


def of_meta(meta: Mapping[str, Any]) -> list[ExpertsLayer]:
    """What a publication says of routed experts; what cannot be understood is left out."""
    stored = meta.get(META)
    found = []
    for row in stored if isinstance(stored, list) else ():
        try:
            found.append(of_json(row))
        except (KeyError, TypeError, ValueError):
            continue  # of another version
    return found


def of_json(row: Mapping[str, Any]) -> ExpertsLayer:
    """Raises KeyError, TypeError or ValueError for what is none."""
    key = LayerKey(*(row[name] for name in LayerKey.__dataclass_fields__))
    times = {str(n): Measured(float(u), float(a), float(b)) for n, (u, a, b) in
             dict(row["backends"]).items()}  # fmt: skip
    oracle = row["oracle_us"]
    return ExpertsLayer(
        (str(row["arch"]), str(row["gpu"]), str(row["profile"])),
        key,
        str(row["traffic"]),
        float(row["covered"]),
        None if oracle is None else float(oracle),
        times,
    )


def single_backends(
    layers: Sequence[ExpertsLayer], default: str | None = None
) -> list[SingleBackend]:
    """The backends that may be chosen in every layer, best first: the fastest, but of those that
    are not told apart the `default`, then names decide. Empty where there is none, or where nothing
    of the traffic was probed."""
    mine = [each for each in layers if each.covered]
    if not mine or any(each.oracle_us is None for each in mine):
        return []
    everywhere = set.intersection(*(set(each.times) for each in mine))
    times = {
        name: Measured(
            math.fsum(each.times[name].us for each in mine),
            math.fsum(each.times[name].lo for each in mine),
            math.fsum(each.times[name].hi for each in mine),
        )
        for name in everywhere
    }
    oracle = math.fsum(each.oracle_us or 0.0 for each in mine)

    def loss(us: float) -> float:
        return max(0.0, 100 * (us / oracle - 1)) if oracle else 0.0

    return [SingleBackend(n, times[n].us, loss(times[n].us)) for n in in_order(times, default)]


def option_text(layer: Mapping[str, Any]) -> str | None:
    """A layer as ``--experts`` takes it, as in ``32,4,2880,2880,swiglu-oai``; None of a dense one.

    `layer` has ``activation``, ``groups``, ``n`` and ``k``."""
    key = experts_key(layer["activation"])
    if key is None:
        return None
    parts = [layer["groups"], key.top_k, layer["n"], layer["k"]]
    if key.gate != "swiglu" or key.scaling != 1:
        parts.append(key.gate)
    if key.scaling != 1:
        parts.append(
            f"{key.scaling:g}" if float(f"{key.scaling:g}") == key.scaling else key.scaling
        )
    return ",".join(map(str, parts))


def layer_words(layer: Mapping[str, Any]) -> str:
    """A layer's sizes in words: ``n=4096 k=2048``, or ``32 experts, 4 a token, 2880x2880``."""
    key = experts_key(layer.get("activation", ""))
    n, k = layer["n"], layer["k"]
    if key is None:
        return f"n={n} k={k}"
    return f"{layer['groups']} experts, {key.top_k} a token, {n}x{k}"


def gates_of(layers: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(format, gate) of the layers of routed experts among some rows, each once, in order."""
    found: dict[tuple[str, str], None] = {}
    for row in layers:
        key = experts_key(row["activation"])
        if key is not None:
            found[row["format"], key.gate] = None
    return sorted(found)
