"""What a person sees while probes run: a live line each on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock

from rich.live import Live
from rich.table import Table

from ...autotune.plan import Plan
from ...autotune.runner import Progress
from ...errors import printable
from .console import InertConsole


@contextmanager
def watching(plan: Plan) -> Iterator[Progress]:
    """Show the progress of one probe on stderr until it ends; yields where to report it."""
    with watching_all([plan]) as progress:
        yield progress[plan.target.label]


@contextmanager
def watching_all(plans: Sequence[Plan]) -> Iterator[dict[str, Progress]]:
    """Show progress on stderr until the probes end; yields where each device reports it.

    Which layer, and what its step is, come under names that start with ``layer``; everything else
    is a backend telling what it does.
    """
    out = InertConsole(stderr=True)
    start = time.monotonic()
    for plan in plans:
        head = (
            f"probing {plan.target.name} ({plan.target.device.arch}), level {plan.level.name}, "
            f"profile {plan.profile.name}, seed {plan.seed}"
        )
        out.print(head)
    labels = [plan.target.label for plan in plans]
    if out.is_terminal:
        with _live(out, start, labels) as progress:
            yield progress
    else:
        alone = len(labels) == 1
        yield {label: _progress_lines(start, "" if alone else f"{label} ") for label in labels}


@contextmanager
def _live(out: InertConsole, start: float, labels: Sequence[str]) -> Iterator[dict[str, Progress]]:
    doing: dict[str, dict[str, str]] = {label: {} for label in labels}
    layer = dict.fromkeys(labels, "")
    lock = Lock()

    def table() -> Table:
        grid = Table.grid(padding=(0, 2))
        for label in labels:
            grid.add_row(f"{time.monotonic() - start:5.0f} s", f"{label}  {layer[label]}")
            for name, text in doing[label].items():
                grid.add_row(name, text)
        return grid

    with Live(table(), console=out, refresh_per_second=8, transient=True) as live:

        def progress(label: str, who: str, text: str) -> None:
            with lock:
                if who.startswith("layer"):
                    layer[label] = f"{who}  {text}"
                    doing[label].clear()
                else:
                    doing[label][who] = text
                live.update(table())

        yield {label: partial(progress, label) for label in labels}


def _progress_lines(start: float, prefix: str) -> Progress:
    """One line per step of a layer and per finished build; workers' own chatter is left out."""

    def progress(who: str, text: str) -> None:
        if who.startswith(("layer", "survey")) or text.startswith("built"):
            seconds = time.monotonic() - start
            line = printable(f"[{seconds:6.1f} s] {prefix}{who}: {text}")
            print(line, file=sys.stderr, flush=True)

    return progress
