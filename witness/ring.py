"""What the host reads of a device once a second: counters, and records of what was suspicious."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..machine.capture import let_others_capture
from ..probes.problem import FORMATS, Fp4Tensor
from .groups import Groups
from .launch import HEADER, Bench


@dataclass(frozen=True, slots=True)
class Record:
    """One suspicious row in one group, with the evidence as the kernel copied it.

    site    which call, as its `CallSite` has it
    m, row  rows of that call, and which of them
    tick    launches of this call before it
    gap, limit  |d|, and how far it might have been
    alpha   the whole factor, the weight's global scale included
    payload uint8: the row of A, then the group's columns of Y
    """

    site: int
    m: int
    row: int
    group: int
    expert: int
    tick: int
    gap: float
    limit: float
    alpha: float
    payload: torch.Tensor


@dataclass(frozen=True, slots=True)
class RowEvidence:
    """The row of a record as tensors on the host: a (1, k) and y (1, columns)."""

    a: torch.Tensor | Fp4Tensor
    y: torch.Tensor


def evidence(
    record: Record, activation: str, dtype: torch.dtype, groups: Groups, k: int
) -> RowEvidence:
    """What a record holds. `activation` is ``nvfp4``, ``mxfp4`` or, 16-bit in `dtype`, ``bf16``."""
    data = record.payload
    if activation in FORMATS:
        fmt = FORMATS[activation]
        cols = k // fmt.block
        codes, scales = data[: k // 2].clone(), data[k // 2 : k // 2 + cols].clone()
        one = torch.ones((), dtype=torch.float32)
        a: torch.Tensor | Fp4Tensor = Fp4Tensor(fmt, codes.unsqueeze(0), scales.unsqueeze(0), one)
        rest = data[k // 2 + cols + cols % 2 :]
    else:
        a = data[: 2 * k].clone().view(dtype).unsqueeze(0)
        rest = data[2 * k :]
    columns = groups.columns(record.group)
    y = rest[: 2 * (columns.stop - columns.start)].clone().view(dtype).unsqueeze(0)
    return RowEvidence(a, y)


class RingReader:
    """Reads one `Bench`, again and again, without stopping what runs on its device.

    On a GPU it copies on a stream of its own into pinned memory made once, in a thread that lets
    others capture graphs meanwhile.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._device = bench.counters.device
        self._done = 0
        self._open = bench.slots
        self._settled = 0
        """Of the claims before this one, those without a record never get one."""
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None
        self._event = torch.cuda.Event() if on_gpu else None
        self._counters = torch.zeros_like(bench.counters, device="cpu", pin_memory=on_gpu)
        self._ring = torch.zeros_like(bench.ring, device="cpu", pin_memory=on_gpu)
        self._state = torch.zeros(2, dtype=torch.int64, pin_memory=on_gpu)
        self._room = torch.zeros(1, dtype=torch.int64, pin_memory=on_gpu)

    def counters(self) -> torch.Tensor:
        """int64 (calls, WIDE) as they are now."""
        self._copy(((self._counters, self._bench.counters), (self._state, self._bench.ring_state)))
        return self._counters

    def records(self) -> list[Record]:
        """What came since the last time; to be called after `counters`, which says how many."""
        claimed = int(self._state[0])
        if claimed == self._done:
            return []
        self._copy(((self._ring, self._bench.ring),))
        there, late = [], None
        # What was claimed when there was no room for it has no record, and never will.
        for claim in range(self._done, min(claimed, self._open)):
            slot = claim % self._bench.slots
            if int(self._ring[slot, :8].view(torch.int64)) == claim + 1:
                there.append(slot)
            elif claim >= self._settled:
                late = claim  # being written just now; the next time it is there or was never
                break
        # Once more: a head that was there stands for a record that is whole from then on.
        self._copy(((self._ring, self._bench.ring),))
        found = [_read_record(self._ring[slot]) for slot in there]
        self._settled = claimed
        self._done = claimed if late is None else late
        if late is None or claimed <= self._open:
            self._make_room(self._done + self._bench.slots)
            # What was claimed until there was room again may have found none.
            self._copy(((self._state, self._bench.ring_state),))
            self._settled = int(self._state[0])
        return found

    def _make_room(self, until: int) -> None:
        self._open = until
        self._room[0] = until
        self._copy(((self._bench.ring_state[1:], self._room),))

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Inside, this thread's work on the device goes to the reader's own stream, and is done
        when it is left: nothing else waits for it, and captures of graphs go on."""
        if self._stream is None or self._event is None:
            yield
            return
        with let_others_capture(), torch.cuda.stream(self._stream):
            yield
            self._event.record()
            self._event.synchronize()

    def _copy(self, pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]) -> None:
        with self.quietly():
            for to, source in pairs:
                to.copy_(source, non_blocking=True)


def _read_record(raw: torch.Tensor) -> Record:
    head = raw[:64].view(torch.int64).tolist()
    gap, limit, alpha = raw[64:76].view(torch.float32).tolist()
    _, site, row, group, expert, m, tick, _ = head
    return Record(site, m, row, group, expert, tick, gap, limit, alpha, raw[HEADER:].clone())
