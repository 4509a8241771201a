"""A process with everything below it, by psutil: who is there, and ending them all."""

from __future__ import annotations

import contextlib
import time

import psutil

_SWEEPS = 40
_PAUSE = 0.005


def living_below(pid: int) -> list[psutil.Process]:
    """The living descendants of a process, zombies left out; empty where it is gone."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    return [process for process in found if lives(process)]


def lives(process: psutil.Process) -> bool:
    """Whether this very process, and no other of its number, is there and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.kill()


def end_below(pid: int) -> list[psutil.Process]:
    """Kill every descendant of a living process; those that are still there after a moment.

    Swept until nothing is found: one may start another while it is looked for. What loses its
    parent comes to the nearest ancestor that adopts, so `pid` should be one (`beside` is).
    """
    left: list[psutil.Process] = []
    for sweep in range(_SWEEPS):
        left = living_below(pid)
        if not left:
            break
        for process in left:
            kill(process)
        if sweep:
            time.sleep(_PAUSE)
    return left


def resident(processes: list[psutil.Process]) -> int:
    """Their resident bytes; shared pages count in each."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total
