"""The command ``fp4tune explain``: why this backend."""

from __future__ import annotations

from typing import Annotated

import typer

from ._console import (
    Activation,
    Checkpoint,
    Experts,
    Format,
    Json,
    OutDtype,
    State,
    WhoseProfile,
    one_sentence,
    print_json,
    problem_of,
    say,
    say_layer_status,
    say_wrapped,
    status,
)


def explain(
    ctx: typer.Context,
    m: Annotated[int, typer.Argument(help="Rows of the activation: tokens in the batch.")],
    n: Annotated[
        int | None, typer.Argument(help="Outputs of the layer, on one rank; not with --experts.")
    ] = None,
    k: Annotated[
        int | None, typer.Argument(help="Inputs of the layer, on one rank; not with --experts.")
    ] = None,
    experts: Experts = None,
    format_: Format = "nvfp4",
    activation: Activation = "bf16",
    out_dtype: OutDtype = "bf16",
    profile: WhoseProfile = None,
    checkpoint: Checkpoint = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Say in words why this backend is the choice, and what it costs or saves."""
    with one_sentence():
        from ..autotune import checkpoint_check
        from ..report import documents, explanation
        from ..report.terminal.explain import explained_lines

        place = documents.place_of(state)
        record = None if checkpoint is None else checkpoint_check.find(checkpoint, place)
        problem = problem_of(ctx, (m, n, k), experts)
        document = explanation.explain(place, problem, profile, record)
        if as_json:
            print_json(document)
        else:
            say_layer_status(status(place, profile=profile), problem, profile, place)
            if documents.ledger_problem(place):
                say("What failed is not known, since the ledger is damaged.")
            say_wrapped(explained_lines(document))
        raise typer.Exit(explanation.exit_code(document))
