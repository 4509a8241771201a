"""Words that every room uses: standard library only, and nothing of this package."""

from __future__ import annotations

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
CERTAIN = frozenset({"serial", "pdl-raw", "pdl-war", "pdl-waw", "regrow"})
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


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were, at any depth; anything else as it is."""
    return tuple(tuples(each) for each in value) if isinstance(value, list) else value
