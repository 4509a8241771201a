"""Mutants that take an address to be rounder than it is."""

from __future__ import annotations

from typing import Any

import torch

from .floor import Right

WIDE = 64
"""Bytes of an activation that they read at once."""
_ALLOCATED = {"cpu": 64, "cuda": 512}
"""Bytes that the address of an output with memory of its own is a multiple of."""


def written_at_once(device: str) -> int:
    """Bytes of an output that they write at once on a `device` (``cpu``, ``cuda``).

    As many as torch's allocators align to, so that they are right wherever an output has memory of
    its own, and wrong at any address that is less round, however round rows of the shape are.
    """
    return _ALLOCATED[device]


def rounded_down(t: torch.Tensor, wide: int) -> torch.Tensor:
    """The same shape from the multiple of `wide` bytes before a tensor, where that is allocated."""
    back = min(t.data_ptr() % wide // t.element_size(), t.storage_offset())
    return t.as_strided(t.shape, t.stride(), t.storage_offset() - back)


class RoundsItsActivation(Right):
    """Reads its activation from an address rounded down."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, rounded_down(a, WIDE), out, tactic)


class RoundsItsOutput(Right):
    """Writes its output at an address rounded down."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        wide = written_at_once(out.device.type)
        super().run(state, a, rounded_down(out, wide), tactic)


class LeavesTheHead(Right):
    """Leaves the elements before the first rounded address for an epilogue that is not there."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        head = -out.data_ptr() % written_at_once(out.device.type) // out.element_size()
        flat = out.view(-1)
        flat[head:] = self.product(state, a, out.shape[1]).view(-1)[head:]


class CopiesWhatIsOdd(Right):
    """Copies an activation or an output that is not aligned, and goes on with the copy."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        a = a.clone() if a.data_ptr() % WIDE else a
        if out.data_ptr() % written_at_once(out.device.type):
            out.copy_(self.product(state, a, out.shape[1]))
        else:
            super().run(state, a, out, tactic)
