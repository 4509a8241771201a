"""Mutants that take an address to be rounder than it is."""

from __future__ import annotations

from typing import Any

import torch

from .floor import Right

WIDE = 64
"""Bytes that they read and write at once."""


def rounded_down(t: torch.Tensor) -> torch.Tensor:
    """The same shape from the multiple of `WIDE` bytes before a tensor, where that is allocated."""
    back = min(t.data_ptr() % WIDE // t.element_size(), t.storage_offset())
    return t.as_strided(t.shape, t.stride(), t.storage_offset() - back)


class RoundsItsActivation(Right):
    """Reads its activation from an address rounded down."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, rounded_down(a), out, tactic)


class RoundsItsOutput(Right):
    """Writes its output at an address rounded down."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a, rounded_down(out), tactic)


class LeavesTheHead(Right):
    """Leaves the elements before the first rounded address for an epilogue that is not there."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        head = -out.data_ptr() % WIDE // out.element_size()
        flat = out.view(-1)
        flat[head:] = self.product(state, a, out.shape[1]).view(-1)[head:]


class CopiesWhatIsOdd(Right):
    """Copies an activation or an output that is not aligned, and goes on with the copy."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        a = a.clone() if a.data_ptr() % WIDE else a
        if out.data_ptr() % WIDE:
            out.copy_(self.product(state, a, out.shape[1]))
        else:
            super().run(state, a, out, tactic)
