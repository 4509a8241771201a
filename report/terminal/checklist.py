"""What the doctor found, as a person reads it; without the imports that tables of a probe need."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from ...autotune.doctor import Line
from .console import console, styled

_MARKS = {"good": ("ok", "green"), "note": ("note", "yellow"), "bad": ("bad", "red")}


_WIDE = 120
"""Columns from which on a table has room for what is to be copied."""


def print_doctor(lines: Iterable[Line]) -> None:
    """One line each: what, what was found, what to do; on a narrow terminal one under the other,
    broken at spaces alone."""
    out = console()
    if out.width < _WIDE:
        for line in lines:
            out.print(styled(_MARKS[line.status], f" {line.what}: {line.found}"))
            if line.do:
                out.print(styled(f"     → {line.do}"))
        return
    made = Table(box=None, show_header=False, padding=(0, 2))
    for _ in range(4):
        made.add_column(overflow="fold")
    for line in lines:
        do = f"→ {line.do}" if line.do else ""
        made.add_row(styled(_MARKS[line.status]), line.what, line.found, do)
    out.print(made)
