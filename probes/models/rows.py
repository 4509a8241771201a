"""The rows that say what the layers of a checkpoint are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .quantisation import FP4_FORMATS

PARTS = ("FP4 dense", "FP4 grouped", "not FP4", "not understood")
GROUPED = "routed experts: both GEMMs of them are one layer, as --experts has it"
SPLIT = "tensor parallelism of"
"""In every reason why a layer cannot be split."""


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One shape of one layer, on one rank: n outputs from k inputs, for each of `groups` experts.

    `modules` is a pattern of the checkpoint's names, `count` how many such layers there are.
    `format` is ``nvfp4``, ``mxfp4`` or what the weight is instead; `activation` is ``fp4``,
    ``bf16`` (any 16-bit type) or ``fp8``. `kind` is ``dense``, ``grouped`` or ``other``. `reason`
    says why it is not probed, where it is not.
    """

    name: str
    modules: str
    count: int
    n: int
    k: int
    groups: int
    top_k: int | None
    format: str
    activation: str
    kind: str
    probed: bool
    reason: str | None

    @property
    def split_fails(self) -> bool:
        """Whether it would be probed, could it be split so."""
        return self.kind == "dense" and SPLIT in (self.reason or "")

    @property
    def part(self) -> str:
        """Which of `PARTS` it is in."""
        if self.format not in FP4_FORMATS:
            told = not self.format.startswith(("unknown", "mixed"))
            return "not FP4" if told else "not understood"
        return {"dense": "FP4 dense", "grouped": "FP4 grouped"}.get(self.kind, "not understood")

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CheckpointLayers:
    """All layers of a checkpoint.

    `source` says what they were read from: ``files``, ``configuration`` or both. `dense` and
    `grouped` are the FP4 parameters of the whole model. `stops` is why an engine could not serve it
    at this `tp` at all, where that is so. `assumed`: nothing is said of quantisation, and the
    formats are taken. `scaling` and `gate` are what a configuration says of routed experts:
    ``routed_scaling_factor``, and ``hidden_act`` with ``swiglu_limit``.
    """

    checkpoint: str
    family: str
    source: str
    tp: int
    engine: str | None
    rows: tuple[LayerRow, ...]
    remarks: tuple[str, ...]
    dense: int
    grouped: int
    stops: str | None = None
    assumed: bool = False
    scaling: float = 1.0
    gate: tuple[str, float | None] = ("", None)

    @property
    def probed(self) -> list[LayerRow]:
        return [row for row in self.rows if row.probed]

    @property
    def any_fp4(self) -> bool:
        return any(row.part in PARTS[:2] for row in self.rows)

    def nothing(self) -> str:
        """Why nothing is left to probe, in one sentence."""
        parts = {row.part for row in self.rows}
        kept = [r for r in self.rows if r.part == "FP4 dense"]
        if kept:
            return f"{self.checkpoint}: no dense FP4 layer can be probed: {kept[0].reason}"
        if "FP4 grouped" in parts:
            formats = sorted({r.format for r in self.rows if r.part == "FP4 grouped"})
            return (
                f"{self.checkpoint} has no dense FP4 layer: only its routed experts are FP4 "
                f"({', '.join(formats)}), and they make up no layer that can be probed"
            )
        if "not understood" in parts:
            odd = next(r for r in self.rows if r.part == "not understood")
            return (
                f"{self.checkpoint} has no FP4 layer that is understood here: "
                f"{odd.name}: {odd.reason}"
            )
        others = sorted({r.format for r in self.rows})
        return (
            f"{self.checkpoint} has no FP4 layer: its layers are {', '.join(others) or 'unknown'}"
        )

    def experts(self) -> str | None:
        """One sentence about FP4 experts, where there are some."""
        if not self.grouped:
            return None
        share = self.grouped / (self.grouped + self.dense)
        return f"routed experts are FP4: {100 * share:.3g} % of the FP4 parameters"

    def json(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "family": self.family,
            "source": self.source,
            "tp": self.tp,
            "engine": self.engine,
            "layers": [row.json() for row in self.rows],
            "fp4_parameters": {"dense": self.dense, "grouped": self.grouped},
            "remarks": list(self.remarks),
        }
