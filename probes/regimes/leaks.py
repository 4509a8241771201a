"""Memory that stays: what a process holds before and after calls, and what of it is a leak. Pure,
but for the counters that it reads."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import torch

LEAK_PER_M = 256 << 10
"""Bytes that may stay for each m met the first time: a plan or a kernel, not a workspace."""
LEAK_PER_CALL = 1 << 10
"""Bytes that may stay of a call with an m that is known: none, but for counters' own noise."""
_PIECE = 2 << 20
"""Bytes that a driver gives out at once, at least."""
_PAGE = mmap.PAGESIZE
_QUARTERS = 4
_FAR_MORE = 4
"""Times as much as others take; they do it in bursts, and may in any gap between two calls."""


@dataclass(frozen=True, slots=True)
class CallSeries:
    """For each call the seconds it took on the host, and live bytes before the first and after.

    ``kept`` is what was still there when the device had caught up: work that waits takes memory.
    ``handles`` is how many more open files and threads there are after all calls than before.
    ``others`` are bytes of the device that other processes took meanwhile, about: what was taken
    while nothing was called, for as long as calls took.
    """

    ms: list[int]
    seconds: list[float]
    memory: dict[str, list[int]]
    kept: dict[str, int]
    handles: dict[str, int]
    others: float = 0.0


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


@lru_cache(maxsize=1)
def _mallinfo() -> Any:
    """glibc's own account of what `malloc` has given out (2.33 and newer), or None."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Mallinfo2
    return function


def live_bytes(device: torch.device) -> dict[str, int]:
    """Bytes in use now, by counters that other processes cannot move, but for `device`.

    ``host`` is what `malloc` has given out and not got back; ``allocator`` torch's tensors on the
    GPU; ``device`` all memory in use on it, modules and other libraries' included. ``mapped`` is
    the address space in use, where the system tells it; beside a GPU its driver maps what it likes.
    """
    found: dict[str, int] = {}
    if device.type == "cpu":
        with suppress(OSError, ValueError), open("/proc/self/statm", "rb", buffering=0) as pages:
            found["mapped"] = int(pages.read(64).split()[0]) * _PAGE
    function = _mallinfo()
    if function is not None:
        info = function()
        found["host"] = info.uordblks + info.hblkhd
    if device.type == "cuda":
        found["allocator"] = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        found["device"] = total - free
    return found


def open_handles() -> dict[str, int]:
    """This process's open files and threads, where the system lists them."""
    folders = {"open files": "/proc/self/fd", "threads": "/proc/self/task"}
    return {name: len(os.listdir(at)) for name, at in folders.items() if os.path.isdir(at)}


def grows(series: Sequence[int]) -> bool:
    """Whether the last value of each quarter is above the last of the quarter before."""
    if len(series) <= 2 * _QUARTERS:
        return False
    step = (len(series) - 1) / _QUARTERS
    ends = [series[round(step * quarter)] for quarter in range(_QUARTERS + 1)]
    return all(later > earlier for earlier, later in zip(ends, ends[1:], strict=False))


def stepwise(series: Sequence[int]) -> bool:
    """Whether memory of the device was taken in many small steps, call by call, as a leak is.

    A driver gives it out in pieces of 2 MiB. Another process that starts takes it in few large
    ones.
    """
    steps = sum(later > earlier for earlier, later in zip(series, series[1:], strict=False))
    pieces = (series[-1] - series[0]) / _PIECE
    return steps >= min(len(series) - 1, pieces) / 2


def slope(series: Sequence[int]) -> float:
    """Theil and Sen's slope, in bytes a call: the median over all pairs."""
    pairs = [
        (series[j] - series[i]) / (j - i)
        for i in range(len(series))
        for j in range(i + 1, len(series))
    ]
    return median(pairs) if pairs else 0.0


def _outgrows_others(series: CallSeries) -> bool:
    """Whether what was taken of the device is far more than others took of it meanwhile."""
    taken = series.memory["device"]
    return taken[-1] - taken[0] > _FAR_MORE * series.others


def leaks(
    new: CallSeries, steady: Sequence[CallSeries], distinct: int
) -> tuple[dict[str, str], dict[str, Any]]:
    """The leak with the most bytes a call, as an error, and all slopes as evidence.

    A leak is growth in each quarter of the calls, by more than `LEAK_PER_M` bytes for each of the
    `distinct` m that were `new`, or `LEAK_PER_CALL` for each call of a known one, in every one of
    the `steady` series; or open files or threads that stay of more than every second call. Where
    others took memory of the device at a like rate, its growth says nothing.
    """
    found: list[tuple[float, dict[str, str]]] = []
    proof: dict[str, Any] = {"new_m": distinct}
    for name, series in new.memory.items():
        kind = "host leak" if name in ("host", "mapped") else "device leak"
        rate = slope(series)
        proof[f"{name}_bytes_per_m"] = round(rate)
        if name == "device" and new.others:
            proof["others_bytes"] = round(new.others)
        total = series[-1] - series[0]
        limit = LEAK_PER_M * max(1, len(series) - 1)
        ours = name != "device" or (stepwise(series) and _outgrows_others(new))
        # The code of a kernel for a new m is mapped, and stays.
        ours &= name != "mapped"
        if grows(series) and min(total, new.kept[name]) > limit and ours:
            text = f"{total / distinct / 1024:.0f} KiB stay for each of {distinct} new m ({name})"
            found.append((total / distinct, {"kind": kind, "message": text}))
        calls = sum(len(each.ms) for each in steady)
        rate = min(slope(each.memory[name]) for each in steady)
        proof[f"{name}_bytes_per_call"] = round(rate)
        total = sum(each.memory[name][-1] - each.memory[name][0] for each in steady)
        # Other processes may take memory on the device, in steps; ours alone moves the rest.
        limit = LEAK_PER_CALL if name != "device" else LEAK_PER_M
        ours = name != "device" or all(map(_outgrows_others, steady))
        alone = ours and all(grows(each.memory[name]) for each in steady)
        kept = sum(each.kept[name] for each in steady)
        if calls and alone and min(total, kept) > limit * calls:
            text = f"{total / calls / 1024:.1f} KiB stay of each of {calls} calls ({name})"
            found.append((total / calls, {"kind": kind, "message": text}))
    calls = sum(len(each.ms) for each in steady)
    for name in steady[0].handles if steady else ():
        stay = sum(each.handles[name] for each in steady)
        # One for every second call, all the way: a pool that fills comes to its end.
        if all(each.handles[name] > len(each.ms) / 2 for each in steady):
            text = f"{stay} {name} stay of {calls} calls"
            found.append((float(stay), {"kind": "host leak", "message": text}))
    worst = max(found, key=lambda each: each[0], default=None)
    return (worst[1] if worst else {}), proof
