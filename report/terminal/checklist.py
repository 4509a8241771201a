"""What the doctor found, as a person reads it; without the imports that tables of a probe need."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...autotune.doctor import Line


def console() -> Console:
    """Where tables go. Without a terminal lines are as long as they need to be."""
    out = Console(highlight=False, soft_wrap=True)
    return out if out.is_terminal else Console(highlight=False, width=200)


def print_doctor(lines: Iterable[Line]) -> None:
    """One line each: what, what was found, what to do."""
    out = console()
    table = Table(box=None, show_header=False, padding=(0, 2))
    marks = {"good": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]bad[/]"}
    for line in lines:
        do = f"→ {line.do}" if line.do else ""
        table.add_row(marks[line.status], escape(line.what), escape(line.found), escape(do))
    out.print(table)
