"""The layers of a preset, of a config.json and of a shape that was typed in, on one rank."""

from __future__ import annotations

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
