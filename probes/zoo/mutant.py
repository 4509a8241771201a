"""What is known of a mutant: its mechanism, and what must be seen of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Mutant:
    """A backend with a known flaw, or known to have none.

    `caught_by` names regimes and data families: at least one finding must be from one of them,
    whichever comes first. With `condition`, the verdict must be safe under the condition of that
    id; with `passes`, safe without one; with neither, unsafe.
    """

    name: str
    """As in `--mutant`; starts with ``zoo-``."""
    failure: str
    """The class of failure it stands for."""
    mechanism: str
    make: Callable[[str], Any] = field(repr=False)
    """Called with the name; gives a `Backend`."""
    caught_by: tuple[str, ...] = ()
    condition: str | None = None
    passes: bool = False
    ends: bool = False
    """Whether it takes its process down, or never returns."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    activation: str = "bf16"
    """The left operand it takes."""
    many: bool = False
    """Whether it shows only over many different m."""
    level: str = "quick"
    """The least level that catches it; one that needs ``soak`` runs when it is asked for."""
    gpu_level: str | None = None
    """That of a GPU, where it is another."""

    def level_on(self, kind: str) -> str:
        """The least level that catches it on such a device."""
        return self.gpu_level or self.level if kind == "cuda" else self.level

    @property
    def expected(self) -> str:
        """What a self-test must show, in words."""
        if self.passes:
            return "safe"
        if self.condition:
            return f"safe under {self.condition}"
        return f"caught by {' or '.join(self.caught_by)}"


SERIAL = ("serial",)
VALUES = ("exact", "realistic")
LANES = ("streams", "graph-streams", "threads", "neighbours")
RACES = ("pdl-raw", "pdl-war", "pdl-waw", "mlp-chain")
ANY_LAUNCH = (
    *SERIAL, "graph", "side-stream", "rewrite", "padding", "strided", "addresses", "weights",
    "callers", "history", "churn", "regrow", "first-calls", *LANES, *RACES,
)  # fmt: skip
"""Where a fault that chance or a counter chooses can come, whatever is being varied."""
GPU = ("cuda",)
