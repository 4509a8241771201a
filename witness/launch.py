"""The kernel's launch: how a call is cut into programs, and what is handed to it.

Nothing here waits, allocates or reads the device: it may be captured into a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..probes.problem import FORMATS, Fp4Tensor, Problem
from .limits import Limit
from .rows import WatchedCall
from .vectors import Sums

COUNTERS = ("rows", "skipped", "suspicions", "beyond", "ticks", "dropped")
"""What a call's int64 counters count: rows judged; rows whose own activation was not finite, or
that were elsewhere; rows in groups that were suspicious; rows in groups too near overflow;
launches; suspicions without a record."""
WIDE = 8
"""int64 of one call's counters."""
HEADER = 128
_PROGRAMS = 264
"""Programs that fill a GPU: two for each of an H200's 132 SMs."""
_ROWS = {1: 1, 8: 4}
"""Rows of a program, up to how often one row a program would fill a GPU; `_MANY` from there on."""
_MANY = 8
_ELEMENTS = 4096
"""Elements of A that a program holds at once."""
SCALE_LAYOUTS = {"linear": 0, "128x4": 1, "8x4": 2}


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows of a program, columns and elements along k that it reads at once, and its warps."""

    rows: int
    block_n: int
    block_k: int
    warps: int


@lru_cache(maxsize=4096)
def cut(m: int, groups: int, width: int, k: int) -> Cut:
    """How a call of m rows is cut: the more rows a program, the more programs there would be with
    one. (By an H200's times of six ways, at most 22 % behind the fastest.)"""
    filled = m * groups / _PROGRAMS
    rows = next((rows for times, rows in _ROWS.items() if filled <= times), _MANY)
    return _cut_of(rows, width, k)


def _cut_of(rows: int, width: int, k: int) -> Cut:
    block_n = 1 << (max(width, 64) - 1).bit_length()
    block_k = min(1 << (k - 1).bit_length(), _ELEMENTS // rows)
    warps = 8 if rows < _MANY and rows * block_n > 512 else 4
    return Cut(rows, block_n, max(block_k, 64), warps)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the kernels of one device leave what they saw.

    counters    int64 (calls, WIDE)
    ring        uint8 (slots, slot_bytes), one record each
    ring_state  int64 (2,): records claimed; the claim from which there is no room
    """

    counters: torch.Tensor
    ring: torch.Tensor
    ring_state: torch.Tensor

    @property
    def slots(self) -> int:
        return self.ring.shape[0]


def bench(device: torch.device, calls: int, slots: int, slot_bytes: int) -> Bench:
    """A fresh one, zeroed."""
    ring = torch.zeros(slots, -(-slot_bytes // 16) * 16, dtype=torch.uint8, device=device)
    state = torch.tensor([0, slots], dtype=torch.int64, device=device)
    return Bench(torch.zeros(calls, WIDE, dtype=torch.int64, device=device), ring, state)


def evidence_bytes(k: int, width: int) -> int:
    """Bytes of a record: the header, a row of a 16-bit activation, a group of the output."""
    return HEADER + 2 * k + 2 * width


@dataclass(frozen=True, slots=True)
class CallSite:
    """Where one call's launches count: its row of the counters, and when it is looked at.

    One launch of `period` is looked at, the one whose number plus `phase` it divides."""

    index: int
    phase: int = 0
    period: int = 1


def launch(
    call: WatchedCall,
    sums: Sums,
    limit: Limit,
    bench: Bench,
    place: CallSite,
    shape: Cut | None = None,
) -> None:
    """Enqueue the check of `call` on the current stream, behind the GEMM that made it.

    `call.alpha` is a float32 tensor () or (1,) on the device. An FP4 activation has its scales in
    `call.scale_layout`; a swizzled one is flat.
    """
    from . import _kernels

    m = call.y.shape[0]
    if m == 0:
        return
    a, scales, kind, stride = _left_memory(call.a)
    dtype = call.y.dtype
    of = shape or cut(m, sums.groups.count, sums.groups.width, sums.k)
    block_k = of.block_k
    y = call.y.view(torch.int16)
    experts = call.experts if call.experts is not None else sums.gate
    bias = call.bias.view(torch.int16) if call.bias is not None else y
    kernel: Any = _kernels.witness
    kernel[(-(-m // of.rows), sums.groups.count)](
        a,
        scales,
        y,
        bias,
        sums.signs,
        sums.sums,
        sums.alpha,
        call.alpha,
        experts,
        sums.gate,
        bench.counters[place.index],
        bench.ring,
        bench.ring_state,
        place.index,
        place.phase,
        place.period,
        m,
        sums.groups.n,
        sums.k,
        stride,
        call.y.stride(0),
        sums.groups.width,
        sums.groups.count,
        sums.experts,
        limit.of_y,
        limit.of_sum,
        limit.floor,
        limit.overflow,
        bench.slots,
        bench.ring.shape[1],
        A_KIND=kind,
        LAYOUT=SCALE_LAYOUTS[call.scale_layout],
        Y_BF16=dtype == torch.bfloat16,
        HAS_BIAS=call.bias is not None,
        GROUPED=call.experts is not None,
        ROWS=of.rows,
        BLOCK_N=of.block_n,
        BLOCK_K=block_k,
        STEP=block_k // 2 if kind >= 2 else block_k,
        num_warps=of.warps,
    )


def _left_memory(a: torch.Tensor | Fp4Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """The activation's memory, its scales, what it is made of, and the elements of a row."""
    if isinstance(a, Fp4Tensor):
        return a.codes, a.scales, 2 if a.format.name == "nvfp4" else 3, a.codes.stride(0)
    kind = 0 if a.dtype == torch.bfloat16 else 1
    bits = a.view(torch.int16)
    return bits, bits, kind, a.stride(0)


def warm(sums: Sums, limit: Limit, problem: Problem, bench: Bench, biased: bool = False) -> None:
    """Compile and load the kernel as calls of `problem` will launch it, all ways to cut them: a
    capture is no time for that. It counts nothing that stays; waits for the device."""
    device, k, width = sums.signs.device, sums.k, sums.groups.width
    y = torch.zeros(1, sums.groups.n, dtype=problem.dtype, device=device)
    one = torch.ones(1, dtype=torch.float32, device=device)
    a: torch.Tensor | Fp4Tensor = torch.zeros(1, k, dtype=problem.dtype, device=device)
    layout = "linear"
    if problem.activation == "fp4":
        fmt, layout = FORMATS[problem.format], "128x4"
        codes = torch.zeros(1, k // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(128 * -(-k // fmt.block // 4) * 4, dtype=torch.uint8, device=device)
        a = Fp4Tensor(fmt, codes, scales, one)
    bias = torch.zeros_like(y[0]) if biased else None
    call = WatchedCall(a, y, one, bias, scale_layout=layout)
    site = CallSite(bench.counters.shape[0] - 1)
    for rows in (*_ROWS.values(), _MANY):
        launch(call, sums, limit, bench, site, _cut_of(rows, width, k))
    torch.cuda.synchronize(device)
    bench.counters[site.index].zero_()
