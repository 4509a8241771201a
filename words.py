"""Words that every room uses: standard library only, and nothing of this package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

EXACT = "exact"
"""The data name of exact problems, in every regime."""
CENSUS = "census"
"""Stands where a regime does in what a census saw. No profile requires it: it may fail, and never
pass for launches that were checked."""
AUDIT = "audit"
"""Stands where a regime does in what was found without a launch, in machine code."""
NOT_TRIED = "not tried"
"""Stands where a regime does in the row that says that a time budget left a candidate out."""
UNCHECKED = (CENSUS, AUDIT, NOT_TRIED)
"""What stands in place of a regime and checks no launch."""
EVERY_M = "every-m"
"""The regime that is run once, of what is chosen: no condition of launches, but all m."""
NO_FORM = "this regime has no form for routed experts"
"""Why a regime that applies to experts as well says nothing of them."""
CHANCE = frozenset(
    {"graph", "mlp-chain", "churn", "streams", "shared-expert", "graph-streams", "threads"}
)
"""Those where a fault waits for chance: what they show grows with their launches alone."""
COLLECTIVE = "collective"
"""An all-reduce behind each GEMM, on two GPUs: a fault of it takes a choice away, and a pass counts
no launch."""
CERTAIN = frozenset(
    {
        *("serial", "side-stream", "pdl-raw", "pdl-war", "pdl-waw"),
        *("rewrite", "padding", "strided", "regrow"),
    }
)
"""Those where a fault of timing shows at once, or none can: more problems, and fewer launches."""

MISSING, UNREADABLE = "missing", "unreadable"
STATUS_WORDS = {
    "safe": "SAFE",
    "stale": "STALE",
    "unproven": "UNPROVEN",
    "quarantined": "QUARANTINED",
    MISSING: "UNPROVEN",
    UNREADABLE: "DAMAGED",
}
"""What people are told of each status of `cache.facts`, everywhere: nothing published is nothing
proven."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold of the weights or of the engine for a verdict to apply."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class ExpertsKey:
    """What stands in a row of routed experts where a dense one has its activation, as in
    ``bf16:top4:swiglu-oai``: the activation, experts of a token, what is between the two GEMMs, and
    the routed scaling where it is not 1."""

    top_k: int
    gate: str
    scaling: float = 1.0

    def __str__(self) -> str:
        scaled = "" if self.scaling == 1 else f":x{self.scaling!r}"
        return f"bf16:top{self.top_k}:{self.gate}{scaled}"


_EXPERTS = re.compile(r"bf16:top(\d{1,9}):([a-z0-9-]{1,64})(?::x([0-9.e+-]{1,32}))?")


def experts_key(activation: object) -> ExpertsKey | None:
    """An `ExpertsKey` of a row's activation; None where that is a dense layer's."""
    found = _EXPERTS.fullmatch(str(activation))
    if found is None:
        return None
    try:
        return ExpertsKey(int(found[1]), found[2], float(found[3] or 1.0))
    except ValueError:
        return None


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were, at any depth; anything else as it is."""
    return tuple(tuples(each) for each in value) if isinstance(value, list) else value
