"""What a person sees while a probe runs: a live line each on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .probe import Plan
from .runner import Progress


@contextmanager
def watching(plan: Plan) -> Iterator[Progress]:
    """Show progress on stderr until the probe ends; yields where to report it.

    Which layer, and what its step is, come under names that start with ``layer``; everything else
    is a backend telling what it does.
    """
    console = Console(stderr=True)
    start = time.monotonic()
    head = (
        f"probing {plan.target.name} ({plan.target.device.arch}), level {plan.level.name}, "
        f"profile {plan.profile.name}, seed {plan.seed}"
    )
    console.print(head, highlight=False)
    if console.is_terminal:
        with _live(console, start) as progress:
            yield progress
    else:
        yield _plain(start)


@contextmanager
def _live(console: Console, start: float) -> Iterator[Progress]:
    doing: dict[str, str] = {}
    layer = [""]

    def table() -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_row(f"{time.monotonic() - start:5.0f} s", layer[0])
        for name, text in doing.items():
            grid.add_row(name, text)
        return grid

    with Live(table(), console=console, refresh_per_second=8, transient=True) as live:

        def progress(who: str, text: str) -> None:
            if who.startswith("layer"):
                layer[0] = f"{who}  {text}"
                doing.clear()
            else:
                doing[who] = text
            live.update(table())

        yield progress


def _plain(start: float) -> Progress:
    """One line per step of a layer and per finished build; workers' own chatter is left out."""

    def progress(who: str, text: str) -> None:
        if who.startswith(("layer", "survey")) or text.startswith("built"):
            print(f"[{time.monotonic() - start:6.1f} s] {who}: {text}", file=sys.stderr, flush=True)

    return progress
