"""``fp4tune report``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import Json, State, one_sentence, print_json, say, say_status, status

Html = Annotated[Path, typer.Option(help="The file to write: one page that needs nothing else.")]


def report(html: Html, state: State = None, as_json: Json = False) -> None:
    """Write what is stored as a page to look at, in one HTML file."""
    with one_sentence():
        from ..report import documents
        from ..report.page import node, render

        place = documents.place_of(state)
        done = render.write(html, node.document(place))
        if as_json:
            print_json({"state": str(place), **done})
        else:
            say_status(status(place))
            say(line(done))


def line(done: dict[str, Any]) -> str:
    """What was written, in a line."""
    return f"{done['path']}: {done['bytes']:,} bytes"
