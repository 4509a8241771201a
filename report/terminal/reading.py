"""A bar on a terminal while a checkpoint's scales are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def reading(total: int) -> Iterator[Callable[[int], None]]:
    """Show how much of `total` bytes is read; yields where to report each part. Nothing is shown
    where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("reading scales"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("scales", total=total)
        yield lambda part: progress.advance(task, part)
