"""The terminal: where tables and lines go, and nothing that a name holds is obeyed.

Names and messages come from plugins, files and other machines. So what is given as text is shown
as text: square brackets are no style, and a character that a terminal would obey is replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ...errors import printable


class InertConsole(Console):
    """A rich console that writes no control sequence but rich's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        # Before anything is laid out: what is replaced may have had another width. A line's end
        # in a name would be a line of the program's own to whoever reads it.
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text, keep="\n"), segment.style)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Texts one after the other, some with a style: (text, style)."""
    made = Text()
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        made.append(printable(text), style)
    return made


def lines(*texts: str) -> Text:
    """Texts below each other."""
    return Text("\n").join(map(styled, texts))


_PADDING = re.compile(r"[ \t]+((?:\x1b\[[0-9;]*m)*)(?=\n|$)")


class TidyConsole(InertConsole):
    """One whose lines end where their text does, so that they are copied and compared as seen."""

    def print(self, *objects: Any, **options: Any) -> None:
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write(_PADDING.sub(r"\1", captured.get()))

    def on_broken_pipe(self) -> None:
        """Nothing: who no longer reads is no reason to end, least of all as if unsafe."""


_NARROWEST = 80
"""Below it numbers would be cut to pieces and columns left out: a terminal that is narrower breaks
the lines of a table, and nothing is lost."""


def console() -> InertConsole:
    """Where tables go: as wide as COLUMNS says or the terminal is, from 80 on; without either,
    lines are as long as they need to be."""
    out = TidyConsole()
    if out.is_terminal or os.environ.get("COLUMNS", "").isdecimal():
        return out if out.width >= _NARROWEST else TidyConsole(width=_NARROWEST)
    return TidyConsole(width=200)


_WHOLE = ("choice", "backend", "m", "tokens")
"""Columns whose names are not broken as long as others can be."""


def table(title: str, headings: Iterable[str | Text], right: Iterable[str | Text] = ()) -> Table:
    """A table without rows; columns named in `right` are set flush right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    numbers = set(map(str, right))
    for heading in headings:
        justify: Any = "right" if str(heading) in numbers else "left"
        made.add_column(heading, justify=justify, overflow="fold", no_wrap=str(heading) in _WHOLE)
    return made
