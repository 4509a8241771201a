"""The routed experts of a model as problems."""

from __future__ import annotations

from dataclasses import asdict

from ..models.experts import experts_on_rank
from ..models.rows import CheckpointLayers
from .problem import ExpertsProblem


def grouped_layers(
    model: CheckpointLayers, tokens: int, ranks: int = 1
) -> tuple[ExpertsProblem, ...]:
    """One problem for each kind of experts that the model has on a rank; see `experts_on_rank`."""
    return tuple(ExpertsProblem(m=tokens, **asdict(each)) for each in experts_on_rank(model, ranks))
