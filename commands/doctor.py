"""The command ``fp4tune doctor``: what is here, and what is missing."""

from __future__ import annotations

import typer

from ..errors import NOT_ASSESSED, SAFE
from ._console import Json, State, one_sentence, print_json, say_status, status


def doctor(state: State = None, as_json: Json = False) -> None:
    """Say what is here, what is missing, and what to do about it."""
    with one_sentence():
        from ..autotune import doctor as checks
        from ..report.terminal.checklist import print_doctor

        lines = checks.examine(state)
        if as_json:
            print_json([line.json() for line in lines])
        else:
            say_status(status(state))
            print_doctor(lines)
        raise typer.Exit(NOT_ASSESSED if any(line.status == "bad" for line in lines) else SAFE)
