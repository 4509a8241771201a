"""The routed experts of a model: its rows of w13 and w2 as one layer."""

from __future__ import annotations

from ..models.dialects import GPT_OSS, OAI
from ..models.rows import CheckpointLayers, LayerRow
from ..problem import FORMATS
from .problem import ExpertsProblem

_GATES = {
    ("", None): "swiglu",
    ("silu", None): "swiglu",
    ("swiglu", None): "swiglu",
    ("", 10.0): "swiglu-10",
    ("silu", 10.0): "swiglu-10",
    ("swiglu", 10.0): "swiglu-10",
    (OAI, 7.0): "swiglu-oai-unbiased",
    (GPT_OSS, 7.0): "swiglu-oai",
}
"""What a configuration's word and limit stand for."""


def grouped_layers(
    model: CheckpointLayers, tokens: int, ranks: int = 1
) -> tuple[ExpertsProblem, ...]:
    """One problem for each pair of FP4 rows, gate-and-up (or up alone) and down, of equal experts.

    Rows that do not go together, and those that `left_out` names, give none. With the experts
    spread over `ranks`, each whole on one, a rank has its share of them, and a token as many of its
    experts there as there can be.
    """
    found: dict[ExpertsProblem, None] = {}
    for up, down in _pairs(model):
        try:
            found[_problem(model, up, down, tokens, ranks)] = None
        except ValueError:
            continue
    return tuple(found)


def left_out(model: CheckpointLayers, ranks: int = 1) -> list[str]:
    """Why FP4 experts of a model give no layer, a sentence each."""
    found: dict[str, None] = {}
    for up, down in _pairs(model):
        try:
            _problem(model, up, down, 1, ranks)
        except ValueError as error:
            found[f"routed experts {up.name}, {down.name} are not probed: {error}"] = None
    return list(found)


def main_layers(model: CheckpointLayers, tokens: int) -> tuple[ExpertsProblem, ...]:
    """Those of the format and the gate that the model's first experts have: an engine runs draft
    layers with another backend where theirs are other ones."""
    every = grouped_layers(model, tokens)
    return tuple(p for p in every if (p.format, p.gate) == (every[0].format, every[0].gate))


def _pairs(model: CheckpointLayers) -> list[tuple[LayerRow, LayerRow]]:
    rows = [r for r in model.rows if r.kind == "grouped" and r.format in FORMATS]
    return [(up, down) for down in rows for up in rows if _one_layer(up, down)]


def _one_layer(up: LayerRow, down: LayerRow) -> bool:
    same = (up.groups, up.top_k, up.format) == (down.groups, down.top_k, down.format)
    alike = up.name.rpartition("_")[0] == down.name.rpartition("_")[0]
    fits = up.k == down.n and up.n in (down.k, 2 * down.k)
    named = down.name.rpartition("_")[2] in ("w2", "down")
    return bool(same and alike and fits and named and up is not down)


def _problem(
    model: CheckpointLayers, up: LayerRow, down: LayerRow, tokens: int, ranks: int
) -> ExpertsProblem:
    """Raises ValueError, one sentence, for what is no problem."""
    if not up.top_k:
        raise ValueError("how many of them a token goes to is not known")
    if up.groups % ranks:
        raise ValueError(f"{up.groups} experts are not spread evenly over {ranks} ranks")
    gate = _GATES.get(model.gate) if up.n == 2 * down.k else "relu2"
    if gate is None:
        word, limit = model.gate
        limited = "" if limit is None else f" with a limit of {limit:g}"
        raise ValueError(f"their activation, {word}{limited}, is none that is known here")
    groups = up.groups // ranks
    return ExpertsProblem(
        up.format,
        tokens,
        down.k,
        down.n,
        groups=groups,
        top_k=min(up.top_k, groups),
        gate=gate,
        scaling=model.scaling,
    )
