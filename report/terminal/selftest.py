"""What a self-test came to, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ...autotune.selftest import OK, Row
from ...machine.devices import Target
from .console import console, styled


def print_rows(target: Target, rows: Sequence[Row], missing: int = 0) -> None:
    """A table of all rows, and how many came out as expected; `missing` were not reached."""
    out = console()
    out.print()
    out.print(styled((target.name, "bold"), f" ({target.device.arch})"))
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("mutant", "expected", "verdict", "found", "launches", "result"):
        made.add_column(heading, justify="right" if heading == "launches" else "left")
    for row in rows:
        found = ", ".join(row.finding.values()) if row.finding else ""
        others = {c["regime"] for c in row.caught} - {row.finding["regime"] if row.finding else ""}
        if others:
            found += f"; also {', '.join(sorted(others))}"
        result = styled((row.result, "" if row.result == OK else "red"))
        made.add_row(row.mutant, row.expected, row.verdict, found, str(row.launches), result)
    out.print(made)
    good = sum(row.result == OK for row in rows)
    out.print(f"{good} of {len(rows)} as expected")
    if missing:
        out.print(f"{missing} were not reached")
