"""What a problem runs on, in the words that choices are stored under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Device:
    """Where a problem runs: a CPU, or a CUDA GPU by its compute capability."""

    kind: str
    """``cpu`` or ``cuda``."""
    sm: int | None = None
    """Compute capability as FlashInfer writes it: 90, 100, 120; None on a CPU."""
    index: int = 0

    @property
    def torch(self) -> Any:
        """The `torch.device` of it."""
        import torch  # what this machine is can be asked without it

        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", self.index)

    @property
    def arch(self) -> str:
        """The key choices are stored under: ``sm90``, or ``cpu``."""
        return "cpu" if self.sm is None else f"sm{self.sm}"
