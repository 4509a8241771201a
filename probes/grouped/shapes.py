"""The routed experts of a model: its rows of w13 and w2 as one layer."""

from __future__ import annotations

from ..models.rows import CheckpointLayers, LayerRow
from ..problem import FORMATS
from .problem import GATES, ExpertsProblem

OAI = "swigluoai"
"""What configurations call gpt-oss's activation."""


def grouped_layers(model: CheckpointLayers, tokens: int) -> tuple[ExpertsProblem, ...]:
    """One problem for each pair of FP4 rows, gate-and-up (or up alone) and down, of equal experts.

    Rows that do not go together (a size that is no multiple of the format's block, experts without
    a top-k, an activation that is not known) give none.
    """
    rows = [r for r in model.rows if r.kind == "grouped" and r.format in FORMATS]
    found: dict[ExpertsProblem, None] = {}
    for down in rows:
        for up in rows:
            made = _paired(model, up, down, tokens)
            if made is not None:
                found[made] = None
    return tuple(found)


def _paired(
    model: CheckpointLayers, up: LayerRow, down: LayerRow, tokens: int
) -> ExpertsProblem | None:
    same = (up.groups, up.top_k, up.format) == (down.groups, down.top_k, down.format)
    alike = up.name.rpartition("_")[0] == down.name.rpartition("_")[0]
    fits = up.k == down.n and up.n in (down.k, 2 * down.k)
    if not (same and alike and fits and up is not down and up.top_k):
        return None
    if down.name.rpartition("_")[2] not in ("w2", "down"):
        return None
    gate = _gate_of(model.gate) if up.n == 2 * down.k else "relu2"
    if gate is None:
        return None
    try:
        return ExpertsProblem(
            up.format,
            tokens,
            down.k,
            down.n,
            groups=up.groups,
            top_k=up.top_k,
            gate=gate,
            scaling=model.scaling,
        )
    except ValueError:
        return None


def _gate_of(said: tuple[str, float | None]) -> str | None:
    """The activation that a configuration's word and limit stand for; None for one not known."""
    word, limit = said
    for gate in GATES.values():
        if gate.gated and gate.limit == limit and (word == OAI) == (gate.offset > 0):
            return gate.name
    return None
