"""Proof by the GPU's own clock that lanes ran at once, and a kernel that makes them meet."""

from __future__ import annotations

import torch


class LaneStamps:
    """When each lane began and ended, by the GPU's own clock, and how often lanes overlapped."""

    def __init__(self, lanes: int, device: torch.device) -> None:
        self._times = torch.zeros((lanes, 2), dtype=torch.int64, device=device)
        self._rounds = torch.zeros(2, dtype=torch.int64, device=device)
        # Compiled and loaded before anything is captured.
        for lane in range(lanes):
            self.take(lane, 0)
            self.take(lane, 1)
        self.count()
        self._rounds.zero_()

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


_FREE = (1, 2, 4, 8)
"""SMs that are left to the lanes, by turns."""
_HOLD_NS = (20_000, 100_000)
_BEGIN_NS = 3_000
_PER_SM = 2
"""Blocks of 1,024 threads that fill an SM."""


class Holder:
    """Takes all but a few SMs for a while: blocks of what is launched meanwhile come one by one.

    How many it leaves and how long it stays change from round to round, so that launches at once
    are interleaved in different ways.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._sms = properties.multi_processor_count
        self.hold(0)  # compiled before anything is captured
        self.let_begin()

    def hold(self, number: int) -> None:
        """Launch it for round `number`, on the current stream."""
        from ._stamp_triton import spin

        free = _FREE[number % len(_FREE)]
        nanoseconds = _HOLD_NS[number // len(_FREE) % len(_HOLD_NS)]
        spin[(max(1, _PER_SM * (self._sms - free)),)](nanoseconds, num_warps=32)

    def let_begin(self) -> None:
        """Wait on the current stream for as long as a holder takes to come."""
        from ._stamp_triton import spin

        spin[(1,)](_BEGIN_NS, num_warps=1)
