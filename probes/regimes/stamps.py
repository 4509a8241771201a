"""Proof by the GPU's own clock that lanes ran at once."""

from __future__ import annotations

import torch


class LaneStamps:
    """When each lane began and ended, by the GPU's own clock, and how often lanes overlapped."""

    def __init__(self, lanes: int, device: torch.device) -> None:
        self._times = torch.zeros((lanes, 2), dtype=torch.int64, device=device)
        self._rounds = torch.zeros(2, dtype=torch.int64, device=device)

    def take(self, lane: int, end: int) -> None:
        from ._stamp_triton import stamp

        stamp[(1,)](self._times, 2 * lane + end)

    def count(self) -> None:
        """Count this round, and whether any lane began before one that began earlier ended."""
        starts, order = self._times[:, 0].sort()
        ends = self._times[:, 1][order].cummax(0).values
        overlapped = (starts[1:] < ends[:-1]).any()
        self._rounds += torch.stack([torch.ones_like(self._rounds[0]), overlapped.long()])

    def proof(self) -> dict[str, int]:
        rounds, overlapped = self._rounds.tolist()
        return {"rounds": rounds, "overlapped": overlapped}
