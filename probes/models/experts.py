"""The routed experts of a model: its rows of w13 and w2 as one layer. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...words import ExpertsKey
from .dialects import GPT_OSS, OAI
from .rows import CheckpointLayers, LayerRow

_BLOCKS = {"nvfp4": 16, "mxfp4": 32}
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


@dataclass(frozen=True, slots=True)
class ExpertsOnRank:
    """The routed experts of one layer on one rank: `groups` of them, intermediate size `n`, hidden
    size `k`."""

    format: str
    groups: int
    top_k: int
    n: int
    k: int
    gate: str
    scaling: float

    @property
    def row(self) -> dict[str, object]:
        """The columns that a row about it has."""
        activation = str(ExpertsKey(self.top_k, self.gate, self.scaling))
        return {"activation": activation, "groups": self.groups, "n": self.n, "k": self.k}


def experts_on_rank(model: CheckpointLayers, ranks: int = 1) -> tuple[ExpertsOnRank, ...]:
    """One for each pair of FP4 rows, gate-and-up (or up alone) and down, of equal experts.

    Rows that do not go together, and those that `left_out` names, give none. With the experts
    spread over `ranks`, each whole on one, a rank has its share of them, and a token as many of its
    experts there as there can be.
    """
    found: dict[ExpertsOnRank, None] = {}
    for up, down in _pairs(model):
        try:
            found[_of_one_rank(model, up, down, ranks)] = None
        except ValueError:
            continue
    return tuple(found)


def split_of_experts(tp: int, ep: int) -> int:
    """Over how many ranks the matrices of one expert are split, where the experts of a model that
    is split over `tp` are spread over `ep`. Raises ValueError, one sentence."""
    if tp < 1:
        raise ValueError(f"--tp {tp}: tensor parallelism is at least 1")
    if ep < 1:
        raise ValueError(f"--ep {ep}: experts are spread over one rank at least")
    if tp % ep and ep % tp:
        raise ValueError(f"--ep {ep} does not go with --tp {tp}: one must divide the other")
    return max(1, tp // ep)


def left_out(model: CheckpointLayers, ranks: int = 1) -> list[str]:
    """Why FP4 experts of a model give no layer, a sentence each."""
    found: dict[str, None] = {}
    for up, down in _pairs(model):
        try:
            _of_one_rank(model, up, down, ranks)
        except ValueError as error:
            found[f"routed experts {up.name}, {down.name} are not probed: {error}"] = None
    return list(found)


def main_experts(model: CheckpointLayers) -> tuple[ExpertsOnRank, ...]:
    """Those of the format and the gate that the model's first experts have: an engine runs draft
    layers with another backend where theirs are other ones."""
    every = experts_on_rank(model)
    return tuple(e for e in every if (e.format, e.gate) == (every[0].format, every[0].gate))


def _pairs(model: CheckpointLayers) -> list[tuple[LayerRow, LayerRow]]:
    rows = [r for r in model.rows if r.kind == "grouped" and r.format in _BLOCKS]
    return [(up, down) for down in rows for up in rows if _one_layer(up, down)]


def _one_layer(up: LayerRow, down: LayerRow) -> bool:
    same = (up.groups, up.top_k, up.format) == (down.groups, down.top_k, down.format)
    alike = up.name.rpartition("_")[0] == down.name.rpartition("_")[0]
    fits = up.k == down.n and up.n in (down.k, 2 * down.k)
    named = down.name.rpartition("_")[2] in ("w2", "down")
    return bool(same and alike and fits and named and up is not down)


def _of_one_rank(
    model: CheckpointLayers, up: LayerRow, down: LayerRow, ranks: int
) -> ExpertsOnRank:
    """Raises ValueError, one sentence, for what no backend could compute."""
    if not up.top_k:
        raise ValueError("how many of them a token goes to is not known")
    if up.groups % ranks or up.groups // ranks < 2:
        raise ValueError(f"{up.groups} experts are not spread over {ranks} ranks, two on each")
    gate = _GATES.get(model.gate) if up.n == 2 * down.k else "relu2"
    if gate is None:
        word, limit = model.gate
        limited = "" if limit is None else f" with a limit of {limit:g}"
        raise ValueError(f"their activation, {word}{limited}, is none that is known here")
    block = _BLOCKS[up.format]
    for name, size in (("intermediate", down.k), ("hidden", down.n)):
        if size % block:
            raise ValueError(
                f"the {name} size {size} is not a multiple of {up.format}'s block of {block}"
            )
    groups = up.groups // ranks
    top_k = min(up.top_k, groups)
    return ExpertsOnRank(up.format, groups, top_k, down.k, down.n, gate, model.scaling)
