"""The command ``fp4tune explain``: why this backend."""

from __future__ import annotations

from typing import Annotated

import typer

from ._console import Checkpoint, Json, State, one_sentence, print_json


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
        from ..autotune import checkpoint_check
        from ..report import documents
        from ..report.terminal import explain as explaining

        place = documents.place_of(state)
        record = None if checkpoint is None else checkpoint_check.find(checkpoint, place)
        document = explaining.explain(
            place, m, n, k, format_, activation, out_dtype, profile, record
        )
        if as_json:
            print_json(document)
        else:
            typer.echo("\n".join(explaining.lines(document)))
        raise typer.Exit(explaining.exit_code(document))
