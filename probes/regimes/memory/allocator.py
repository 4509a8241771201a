"""Poison in memory that the allocator hands out next, and ownership of memory it has back.

A workspace from `torch.empty` holds whatever was there; after `FreeMemory.poison` that is a NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ...check.sweep import POISON

_SMALL = 1 << 20
"""Requests up to here are served from the caching allocator's pool of small blocks."""
NAN_BYTE = 0xFF
"""All over: a NaN in bf16, fp16, fp32, e4m3 and e8m0."""
_M_PERTURB = -6
_TRIED = (1 << 16, 4 << 20)
"""Bytes of what is asked for to see the poison: from the small blocks and from the large one."""
_LEAST = 32 << 20
_SMALL_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Block:
    """Memory the caching allocator has free: `size` bytes, for work on `stream` (a handle)."""

    stream: int
    size: int


def free_blocks(device: torch.device) -> list[Block]:
    """The free blocks of the ordinary pool of a GPU (those of graphs are left alone)."""
    found = []
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] != (device.index or 0):
            continue
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
            continue
        most = _SMALL if segment["segment_type"] == "small" else segment["total_size"]
        for block in segment["blocks"]:
            left = block["size"] if block["state"] == "inactive" else 0
            while left > 0:
                found.append(Block(int(segment["stream"]), min(left, most)))
                left -= most
    return found


def take_poisoned(
    blocks: Sequence[Block], device: torch.device, word: int = POISON
) -> list[torch.Tensor]:
    """Allocate the free `blocks` and fill them with `word`: int16, one tensor a block.

    Largest first, so that the allocator's best fit for each is the block it describes. Filled on
    the stream each belongs to, after whatever used it there.
    """
    held = []
    for block in sorted(blocks, key=lambda b: b.size, reverse=True):
        with torch.cuda.stream(torch.cuda.ExternalStream(block.stream, device=device)):
            held.append(torch.full((block.size // 2,), word, dtype=torch.int16, device=device))
    return held


def changed_words(held: Sequence[torch.Tensor]) -> int:
    """How many 16-bit words of memory taken with `take` are no longer the poison; waits."""
    if not held:
        return 0
    torch.cuda.synchronize(held[0].device)
    return int(torch.stack([(each != POISON).sum() for each in held]).sum())


class FreeMemory:
    """Has what is allocated next hold poison: a context, in which `poison` may be called often.

    On a GPU this thread's memory comes from a pool of its own meanwhile: blocks that hold nothing
    but poison, large enough for what `learn` saw being allocated. On a CPU the C library is told to
    fill whatever it hands out (glibc's ``M_PERTURB``).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._large = _LEAST
        self._pools: list[Any] = []
        self._stack = ExitStack()
        self.seen = 0
        """How often memory asked for after poisoning held the poison; on a GPU `learn` tries it."""
        self.rounds = 0
        self.need = 0
        """Bytes that `learn` saw in use at a time."""

    def __enter__(self) -> FreeMemory:
        if self._cuda:
            self._renew()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        # Here and now: torch aborts where a pool ends while memory comes from another.
        self._pools.clear()
        if not self._cuda:
            _fill_new_memory(None)

    def _renew(self) -> None:
        """Go on with a pool in which nothing is allocated yet."""
        self._stack.close()
        pool = torch.cuda.MemPool()
        self._pools.append(pool)
        self._stack.enter_context(torch.cuda.use_mem_pool(pool, self._device))

    @property
    def size(self) -> int:
        """Bytes poisoned each time; 0 on a CPU, where it is all that is asked for."""
        return _SMALL_BLOCKS * _SMALL + self._large if self._cuda else 0

    def learn(self, run: Callable[[], Any]) -> None:
        """Call `run` to see how much memory it needs at a time; what it keeps is not in the way."""
        if not self._cuda:
            run()
            return
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        self.need = need = torch.cuda.max_memory_allocated(self._device) - before
        free, _ = torch.cuda.mem_get_info(self._device)
        self._large = max(_LEAST, -(-min(2 * need, free // 4) // _LEAST) * _LEAST)
        self._renew()
        self.poison()
        tried = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in _TRIED]
        self.seen += all(bool((each == NAN_BYTE).all()) for each in tried)

    def poison(self, byte: int = NAN_BYTE) -> None:
        """Let what is allocated next hold `byte` all over, by default a NaN of any type."""
        self.rounds += 1
        if self._cuda:
            sizes = [self._large, *[_SMALL] * _SMALL_BLOCKS]
            held = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
            while held:  # nothing of it outlives this, whoever looks at our frame
                held.pop().fill_(byte)
            return
        _fill_new_memory(byte)
        self.seen += int(torch.empty(_TRIED[0], dtype=torch.uint8)[_TRIED[0] // 2] == byte)


def poison_in_graph(need: int, device: torch.device) -> None:
    """Let what is allocated next, up to `need` bytes, hold NaN: from the pool of the graph that is
    being captured, in each replay again."""
    if not need:
        return
    held = [
        torch.empty(size, dtype=torch.uint8, device=device)
        for size in (_SMALL, max(need, 2 * _SMALL))
    ]
    for each in held:
        each.fill_(NAN_BYTE)


def _fill_new_memory(byte: int | None) -> None:
    """Have `malloc` fill what it hands out with `byte`; None for what is there, as ever."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # It fills with the complement, and takes 0 for off: a bit above the byte stands for 0xFF.
        mallopt(_M_PERTURB, 0 if byte is None else (byte ^ 0xFF) | 0x100)
