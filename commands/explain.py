"""The command ``fp4tune explain``: why this backend."""

from __future__ import annotations

from typing import Annotated

import typer

from ._console import Checkpoint, Json, State, one_sentence, print_json, say_lines


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
        from ..probes.problem import Problem
        from ..report import documents, explanation
        from ..report.terminal.explain import explained_lines

        place = documents.place_of(state)
        record = None if checkpoint is None else checkpoint_check.find(checkpoint, place)
        problem = Problem(format_, m, n, k, activation, out_dtype)
        document = explanation.explain(place, problem, profile, record)
        if as_json:
            print_json(document)
        else:
            say_lines(explained_lines(document))
        raise typer.Exit(explanation.exit_code(document))
