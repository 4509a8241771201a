"""What every launch is checked for, without stopping the device between launches.

Outputs live in *slots*: poisoned memory between two guard zones. A *sweep* reads each slot once,
compares every element with its expected interval, adds to counters on the device and poisons the
slot again; the host reads the counters when a regime ends.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import torch

POISON = -91
"""The bits 0xFFA5: a NaN in bf16 and in fp16 whose payload no arithmetic produces."""
GUARD = 0x5A5A
TILE = 128
_NONE = 0x7FFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one launch writes, and what must then be there.

    out (m, n) 16-bit floats, contiguous; lo, hi (m, n) of the same dtype, contiguous: an element is
    right when ``lo <= out <= hi``. `guarded` is the memory around it, as int16.
    """

    out: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor
    guarded: torch.Tensor


@dataclass(frozen=True, slots=True)
class SlotReport:
    """What the sweeps saw in one slot. Counts are elements over all launches."""

    wrong: int
    """Elements outside their interval; unwritten and non-finite ones included."""
    unwritten: int
    not_finite: int
    bad_launches: int
    guard: int
    """Elements of the guard zones that changed."""
    witness: tuple[int, int, float, float, float] | None
    """row, column, value found, lowest and highest value allowed, of one wrong element."""
    tiles: tuple[tuple[int, int, int], ...]
    """(tile row, tile column, wrong elements) of every 128x128 tile that was ever wrong."""
    early: int = 0
    """Elements that were written while the kernel before still read what had been there."""
    first: int = 0
    """The sweep, from 1, that saw the first wrong element; 0 for none."""
    draw: int = 0
    """How often rows had been drawn again before that sweep."""
    stage: str = ""
    """Which of several layers in a row this is the output of; empty for the one under test."""
    shape: tuple[int, int] | None = None
    """(m, n) of the output; None: as the launch under test has it."""

    @property
    def clean(self) -> bool:
        return self.wrong == 0 and self.guard == 0 and self.early == 0


def slot(lo: torch.Tensor, hi: torch.Tensor, guard: int | None = None) -> Slot:
    """A poisoned slot for outputs between `lo` and `hi` (m, n), with guard zones around it.

    The zones hold a whole tile of rows (at most 1 MiB each), since a kernel that runs over the end
    writes rows; or `guard` elements at least, where many slots are wanted.
    """
    m, n = lo.shape
    # A multiple of 1 KiB keeps the output as aligned as the allocator made the buffer.
    guard = -(-(min(TILE * n, 1 << 19) if guard is None else guard) // 512) * 512
    buffer = torch.full((2 * guard + m * n,), GUARD, dtype=torch.int16, device=lo.device)
    inside = buffer[guard : guard + m * n]
    inside.fill_(POISON)
    return Slot(inside.view(lo.dtype).view(m, n), lo, hi, buffer)


def slot_bytes(m: int, n: int) -> int:
    """Device memory that `slot` takes for an (m, n) output."""
    return 2 * m * n + 2 * 2 * (min(TILE * n, 1 << 19) + 512)


def _guard_changes(slot: Slot) -> torch.Tensor:
    size = slot.out.numel()
    guard = (slot.guarded.numel() - size) // 2
    changed = (slot.guarded[:guard] != GUARD).sum()
    return changed + (slot.guarded[guard + size :] != GUARD).sum()


class Checker:
    """Sweeps a fixed set of slots. `sweep` enqueues and never waits; `reports` waits."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        device = self.slots[0].out.device
        self._columns = [-(-s.out.shape[1] // TILE) for s in self.slots]
        tiles = [
            -(-s.out.shape[0] // TILE) * columns
            for s, columns in zip(self.slots, self._columns, strict=True)
        ]
        self._first_tile = [0, *accumulate(tiles)][:-1]
        self._tiles = sum(tiles)
        size = len(self.slots)
        self._counts = torch.zeros((size, 6), dtype=torch.int64, device=device)
        self._counts[:, 5] = _NONE
        self._witness = torch.full((size,), _NONE, dtype=torch.int64, device=device)
        self._bitmap = torch.zeros(self._tiles, dtype=torch.int32, device=device)
        self._launch = torch.zeros(1, dtype=torch.int64, device=device)
        self._marks: list[torch.Tensor] = []
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            addresses = [
                (s.out.data_ptr(), s.lo.data_ptr(), s.hi.data_ptr(), *s.out.shape)
                for s in self.slots
            ]
            self._table = uploaded(torch.tensor(addresses, dtype=torch.int64), device)
            self._tile_table = _tile_table(tiles, self._first_tile, self._columns, device)
            self._aligned = all(map(_rows_aligned, self.slots))

    @property
    def sweeps(self) -> int:
        """How many sweeps have run; waits for the device."""
        return int(self._launch.item())

    def mark(self) -> None:
        """Note that what is swept from now on is of another draw; enqueues only."""
        self._marks.append(self._launch.clone())

    def sweep(self) -> None:
        """Check every slot and poison it again, on the current stream (capturable)."""
        if self._on_cuda:
            if self._tiles:
                from ._sweep_triton import sweep

                sweep[(self._tiles,)](
                    self._table,
                    self._tile_table,
                    self._counts,
                    self._witness,
                    self._bitmap,
                    self._launch,
                    POISON,
                    IS_BF16=self.slots[0].out.dtype == torch.bfloat16,
                    ALIGNED=self._aligned,
                    TILE=TILE,
                    ROWS=16,
                    num_warps=8,
                )
        else:
            for index, s in enumerate(self.slots):
                if s.out.numel():
                    self._sweep_on_host(index, s)
        self._launch += 1

    def _sweep_on_host(self, index: int, s: Slot) -> None:
        bits = s.out.view(torch.int16)
        wrong = ~((s.out >= s.lo) & (s.out <= s.hi))
        if bool(wrong.any()):
            unwritten = wrong & (bits == POISON)
            not_finite = wrong & ~unwritten & ~torch.isfinite(s.out)
            totals = torch.stack([wrong.sum(), unwritten.sum(), not_finite.sum()])
            self._counts[index, :3] += totals
            self._counts[index, 3] += 1
            self._counts[index, 5] = min(int(self._counts[index, 5]), self.sweeps + 1)
            flat = int(wrong.flatten().nonzero()[0])
            packed = (flat << 16) | (int(bits.flatten()[flat]) & 0xFFFF)
            self._witness[index] = min(int(self._witness[index]), packed)
            rows, cols = wrong.nonzero(as_tuple=True)
            within = rows // TILE * self._columns[index] + cols // TILE
            places = self._first_tile[index] + within
            self._bitmap.index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        bits.fill_(POISON)

    def reports(self) -> list[SlotReport]:
        """One report a slot; waits for the device and reads the guard zones."""
        # All in one piece: each wait costs a turn of whoever shares the device.
        size = len(self.slots)
        guards = torch.stack([_guard_changes(s) for s in self.slots])
        bad_tiles = self._bitmap.count_nonzero().view(1)
        parts = (guards, self._witness, bad_tiles, self._counts.view(-1), *self._marks)
        seen = iter(torch.cat(parts).tolist())
        guarded, witness, (bad,) = (list(islice(seen, many)) for many in (size, size, 1))
        counts = [list(islice(seen, 6)) for _ in self.slots]
        marks = list(seen)
        marked: list[list[tuple[int, int, int]]] = [[] for _ in self.slots]
        for place, wrong in self._bad_tiles() if bad else ():
            # Slots without an element have no tile: the last slot to begin here is the one.
            index = bisect_right(self._first_tile, place) - 1
            row, col = divmod(place - self._first_tile[index], self._columns[index])
            marked[index].append((row, col, wrong))
        return [
            SlotReport(
                wrong=count[0],
                unwritten=count[1],
                not_finite=count[2],
                bad_launches=count[3],
                guard=guard,
                witness=_unpack(packed, s),
                tiles=tuple(tiles),
                first=0 if count[5] == _NONE else count[5],
                draw=0 if count[5] == _NONE else bisect_left(marks, count[5]),
                shape=(s.out.shape[0], s.out.shape[1]),
            )
            for s, count, guard, packed, tiles in zip(
                self.slots, counts, guarded, witness, marked, strict=True
            )
        ]

    def _bad_tiles(self) -> list[list[int]]:
        """Which tiles were ever wrong, each with how many elements; waits for the device."""
        places = self._bitmap.nonzero().flatten()
        found: list[list[int]] = torch.stack([places, self._bitmap[places].long()], dim=1).tolist()
        return found


def _rows_aligned(s: Slot) -> bool:
    """Whether each row of what a sweep reads begins at a multiple of 16 bytes: eight elements at a
    time then, instead of one."""
    return s.out.shape[1] % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in (s.out, s.lo, s.hi))


def _tile_table(
    tiles: Sequence[int], first: Sequence[int], columns: Sequence[int], device: torch.device
) -> torch.Tensor:
    """int32 (tiles, 3): slot, tile row and tile column of every tile; made on the device, since a
    chain of large problems has hundreds of thousands."""
    known = uploaded(torch.tensor([tiles, first, columns], dtype=torch.int64), device)
    total = sum(tiles)
    # Told how many there will be, it need not wait to know.
    slots = torch.arange(len(tiles), device=device).repeat_interleave(known[0], output_size=total)
    within = torch.arange(total, device=device) - known[1][slots]
    across = known[2][slots].clamp(min=1)
    return torch.stack([slots, within // across, within % across], dim=1).int().contiguous()


def uploaded(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`, by a copy that is enqueued on the current stream and waited
    for by nobody: out of pinned memory, which torch keeps until it is done."""
    if device.type != "cuda" or not host.numel():
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def _unpack(packed: int, s: Slot) -> tuple[int, int, float, float, float] | None:
    if packed == _NONE:
        return None
    row, col = divmod(packed >> 16, s.out.shape[1])
    bits = packed & 0xFFFF
    signed = torch.tensor(bits - 0x10000 if bits >= 0x8000 else bits, dtype=torch.int16)
    value = float(signed.view(s.out.dtype))
    return row, col, value, float(s.lo[row, col]), float(s.hi[row, col])


class Unchanged:
    """Remembers tensors bit for bit, to tell later whether anything wrote into them.

    `shared` are others that this one's owner has in common with more: a large weight is remembered
    once, however many tokens it is for. Each counts its own tensors only.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], shared: Sequence[Unchanged] = ()) -> None:
        self._pairs = [(t, t.detach().clone()) for t in tensors if t.numel()]
        self._seen: list[torch.Tensor] = []
        self.shared = tuple(shared)

    def look(self, some: Sequence[torch.Tensor]) -> None:
        """Note which of `some` differ, before they are written on purpose; enqueues only."""
        self._seen += [_differ(now, then) for now, then in self._those(some)]

    def renew(self, some: Sequence[torch.Tensor]) -> None:
        """Remember `some` as they are now; enqueues only."""
        for now, then in self._those(some):
            then.copy_(now)

    def changed(self) -> int:
        """How many of the tensors differ, or did, from what they were; waits for the device."""
        return changed_tensors([self])

    def take(self) -> list[torch.Tensor]:
        """bool (): whether each differs, and those that `look` noted, which are noted no longer;
        enqueues only."""
        found = [*self._seen, *(_differ(now, then) for now, then in self._pairs)]
        self._seen.clear()
        return found

    def _those(self, some: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        wanted = {id(each) for each in some}
        return [pair for pair in self._pairs if id(pair[0]) in wanted]


def changed_tensors(watched: Iterable[Unchanged]) -> int:
    """How many tensors of all of these differ, or did; waits once for each device."""
    found: dict[torch.device, list[torch.Tensor]] = {}
    for each in watched:
        for differs in each.take():
            found.setdefault(differs.device, []).append(differs)
    return sum(int(torch.stack(each).sum()) for each in found.values())


def _differ(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool (): whether any bit of two tensors of one shape and type differs; enqueues only."""
    both = bytes_of(one), bytes_of(other)
    if all(map(_whole_words, both)):
        both = both[0].view(torch.int64), both[1].view(torch.int64)
    return (both[0] != both[1]).any()


def _whole_words(data: torch.Tensor) -> bool:
    """Whether bytes can be read eight at a time."""
    return all(x % 8 == 0 for x in (data.numel(), data.storage_offset(), data.data_ptr()))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes in order, as uint8 of one dimension; a view where that can be."""
    return tensor.reshape(-1).view(torch.uint8)
