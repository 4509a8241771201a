"""What a probe shows where there is no GPU and nothing was asked for: good backends and bad ones.

It takes the layer, the backends and the words only from here; all that it does is a probe's.
"""

from __future__ import annotations

from pathlib import Path

from ..probes import registry

PACKAGE = Path(__file__).resolve().parents[1]
LEVEL = "quick"
SHAPE = "128,256"
MAX_M = 4
ACTIVATION = "bf16"
_FLOOR = "torch-dequant"
_EXAMPLES = ("plain.py:Plain", "broken.py:Tail", "broken.py:Scratch")
_FOLDER = PACKAGE / "docs" / "examples"
_RECORDED = PACKAGE / "benchmarks" / "results" / "probe-h200-standard"


def backends() -> tuple[str, ...]:
    """The floor, and of the examples, where they are there, one that is right and two that are
    not. None of them compiles anything."""
    return (_FLOOR, *(f"{_FOLDER}/{each}" for each in _EXAMPLES if _FOLDER.is_dir()))


def recorded() -> Path | None:
    """The recorded probe of an H200 that comes with a checkout; None where it is not here."""
    return _RECORDED if (_RECORDED / "choices.db").is_file() else None


def before() -> list[str]:
    """What to say before it starts."""
    more = sum(name != _FLOOR for name in registry.names())
    return [
        "No NVIDIA GPU is here, so this is a demonstration on the CPU: two backends that are "
        "right, and two examples that are wrong and get caught.",
        f"What a GPU adds: the layers of your model, up to {more} more backends, their speed, CUDA "
        "graphs and launches that overlap, and a choice that SGLang or vLLM can run.",
        "This CPU itself is probed with --gpu none.",
    ]
