"""The command ``fp4tune check-weights``: a checkpoint held against the conditions of verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._console import Json, State, one_sentence, print_json, say_lines


def check_weights(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A folder of safetensors files, its index, one file, or a model's name."
        ),
    ],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Look whether a checkpoint's FP4 weights make sense and meet the conditions of verdicts."""
    with one_sentence():
        from ..autotune import checkpoint_check
        from ..cache.state import directory
        from ..report.terminal.reading import reading

        record = checkpoint_check.check(checkpoint, directory(state), reading)
        if as_json:
            print_json(record)
        else:
            say_lines(checkpoint_check.report(record))
        raise typer.Exit(checkpoint_check.exit_code(record))
