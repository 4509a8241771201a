"""The routed experts of the model that an engine is started with, and what to run them with.

An engine's option for experts is for all of a model's, whatever their format: so it is filled in
only where the checkpoint itself says that they are those that were probed.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from ..cache import reader as reading
from ..cache.experts import option_text
from ..errors import Refused
from . import installed, select
from .select import Selection


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as an engine is asked to serve it: its folder or name, and how it is split."""

    name: str
    tp: int = 1
    expert_parallel: bool = False


@functools.lru_cache(maxsize=8)
def experts_selection(engine: str, model: ServedModel) -> Selection | None:
    """What `engine` should run the model's experts with, decided once per process; None where it
    has none in FP4. Raises StateError, Refused, and ValueError for a model that cannot be read."""
    layers = served_experts(engine, model)
    if not layers:
        return None
    reader = select.open_for(engine, pin=True)
    os.environ.setdefault(reading.VARIABLE, str(reader.generation))
    home = installed.home(engine, acts=True)
    return select.select_experts(reader, engine, layers=layers, home=home)


def served_experts(engine: str, model: ServedModel) -> tuple[str, ...]:
    """The model's FP4 experts on one rank, as ``--experts`` has them. Raises ValueError, and
    Refused where they are split in a way that was not probed."""
    from ..probes.models.experts import main_experts
    from ..probes.models.layers import read_layers

    found = main_experts(read_layers(model.name, model.tp, engine))
    if found and model.expert_parallel:
        raise Refused("experts spread over ranks are not looked up")
    return tuple(str(option_text(each.row)) for each in found)
