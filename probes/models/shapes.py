"""The layers of a preset, of a config.json and of a shape that was typed in, on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .config import made, read_config
from .layers import layers_of_config, read_layers
from .place import find_files
from .presets import PRESETS
from .quantisation import LayerFormat
from .rows import CheckpointLayers

ASSUMED = LayerFormat("nvfp4", "fp4")
"""What the layers of a model are taken as whose configuration says nothing of quantisation."""


@dataclass(frozen=True, slots=True)
class AskedLayer:
    """One (n, k) to probe, with the format and the activation of a checkpoint's layer.

    None: those that the options name. An activation of ``fp4`` is served as ``bf16``, too, where
    the GPU or the engine cannot do better.
    """

    name: str
    n: int
    k: int
    format: str | None = None
    activation: str | None = None

    def takes(self, format_: str, activation: str) -> bool:
        """Whether a problem of that format and activation is one of this layer's."""
        if self.format not in (None, format_):
            return False
        return not (self.activation == "bf16" and activation == "fp4")


def asked(models: Iterable[CheckpointLayers], typed: Sequence[str] = ()) -> tuple[AskedLayer, ...]:
    """What to probe of these models, and of shapes that were typed in; nothing twice.

    Raises ValueError, one sentence; where a model has no dense FP4 layer, that one.
    """
    found: list[AskedLayer] = []
    for model in models:
        if not model.probed:
            raise ValueError(model.nothing())
        for row in model.probed:
            own = (None, None) if model.assumed else (row.format, row.activation)
            found.append(AskedLayer(row.name, row.n, row.k, *own))
    found += [AskedLayer(f"{n}x{k}", n, k) for n, k in map(parse_shape, typed)]
    unique: dict[tuple[object, ...], AskedLayer] = {}
    for layer in found:
        unique.setdefault((layer.n, layer.k, layer.format, layer.activation), layer)
    return tuple(unique.values())


@cache
def preset_layers(name: str, tp: int = 1) -> CheckpointLayers:
    """The layers of a model in `PRESETS`. Raises ValueError for an unknown name or a bad `tp`."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    found = PRESETS[name]
    return _servable(layers_of_config(name, made(found.model, found.values), tp, ASSUMED))


def config_layers(path: str | Path, tp: int = 1) -> CheckpointLayers:
    """The layers that a Hugging Face config.json implies, or a folder that holds one.

    Weights beside it are not looked at. Raises ValueError, one sentence.
    """
    place = Path(path)
    if not place.is_dir() and not place.is_file():
        raise ValueError(f"{place} cannot be read: there is no such file")
    config = read_config(find_files(place))
    if config is None:
        raise ValueError(f"{place} holds no config.json")
    return _servable(layers_of_config(str(place), config, tp, ASSUMED))


def checkpoint_layers(
    given: str | Path, tp: int = 1, engine: str | None = None
) -> CheckpointLayers:
    """The layers of a checkpoint, see `read_layers`. Raises ValueError where an engine could not
    serve it at this `tp`, too."""
    return _servable(read_layers(given, tp, engine))


def _servable(found: CheckpointLayers) -> CheckpointLayers:
    if found.stops is not None:
        raise ValueError(f"{found.checkpoint}: {found.stops}")
    for row in found.rows:
        # A model's own dense layers: towers and draft layers may be split otherwise, or not at all.
        if row.split_fails and not row.name.startswith(("vision_", "audio_", "mtp_")):
            raise ValueError(f"{found.checkpoint}: {row.reason}")
    return found


def parse_shape(text: str) -> tuple[int, int]:
    """(n, k) of ``"4096,14336"``; ``x`` separates as well. Raises ValueError, one sentence."""
    parts = text.lower().replace("x", ",").split(",")
    try:
        n, k = (int(part) for part in parts)
    except ValueError:
        n = k = 0
    if n < 1 or k < 1:
        raise ValueError(f"{text!r} is not a shape: two positive integers n,k are expected")
    return n, k
