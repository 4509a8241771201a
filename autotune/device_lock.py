"""The lock of a device: a probe has the GPU alone, and leaves when an engine comes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from ..cache import gpulock
from ..errors import NOT_ASSESSED, printable
from ..machine.devices import Target


@contextmanager
def device_lock(target: Target, state_dir: Path) -> Iterator[None]:
    """Hold the GPU's lock alone while the block runs; `leave` as soon as someone shares it.

    Raises Busy, at once, where an engine holds it.
    """
    place = gpulock.path(state_dir, target.uuid or target.label)
    over = Event()
    with gpulock.Turn(place, f"{target.label} ({target.name})") as mine:
        for each in mine.passed:
            sys.stderr.write(f"fp4tune: {printable(each)}\n")
        watcher = Thread(
            target=mine.watch,
            args=(over.wait, lambda: leave(target)),
            daemon=True,
            name="device-lock",
        )
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def leave(target: Target) -> None:
    """End this process now: its workers die with it, and what is in the ledger stays.

    Not by an exception: workers that were killed one by one would be recorded as crashes of their
    backends, and one that waits for a compiler would keep an engine waiting.
    """
    sys.stderr.write(
        f"fp4tune: an engine has taken {target.label} ({target.name}): the probe ends here, "
        "evidence so far is kept\n"
    )
    sys.stderr.flush()
    os._exit(NOT_ASSESSED)
