"""The commands ``fp4tune explain`` and ``fp4tune check-weights``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import Json, State, one_sentence, print_json

Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Say whether these weights meet the conditions; see check-weights."),
]


def explain(
    m: Annotated[int, typer.Argument(help="Rows of the activation: tokens in the batch.")],
    n: Annotated[int, typer.Argument(help="Outputs of the layer, on one rank.")],
    k: Annotated[int, typer.Argument(help="Inputs of the layer, on one rank.")],
    format_: Annotated[str, typer.Option("--format", help="nvfp4 or mxfp4.")] = "nvfp4",
    activation: Annotated[str, typer.Option(help="bf16 (W4A16) or fp4 (W4A4).")] = "bf16",
    out_dtype: Annotated[str, typer.Option(help="Output dtype: bf16 or fp16.")] = "bf16",
    profile: Annotated[
        str | None, typer.Option(help="Whose choice, where several profiles were probed.")
    ] = None,
    checkpoint: Checkpoint = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Say in words why this backend is the choice, and what it costs or saves."""
    with one_sentence():
        from . import discharge, stored
        from . import explain as explaining

        place = stored.place_of(state)
        record = None if checkpoint is None else discharge.find(checkpoint, place)
        document = explaining.explain(
            place, m, n, k, format_, activation, out_dtype, profile, record
        )
        if as_json:
            print_json(document)
        else:
            typer.echo("\n".join(explaining.lines(document)))
        raise typer.Exit(explaining.exit_code(document))


def check_weights(
    checkpoint: Annotated[
        Path, typer.Argument(help="A folder of safetensors files, its index, or one file.")
    ],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Look whether a checkpoint's FP4 weights meet the conditions of verdicts; kept for it."""
    with one_sentence():
        from ..cache.state import directory
        from . import discharge

        record = discharge.check(checkpoint, directory(state))
        if as_json:
            print_json(record)
        else:
            typer.echo("\n".join(discharge.report(record)))
        raise typer.Exit(discharge.exit_code(record))
