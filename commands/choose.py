"""The command ``fp4tune choose``: the stored choice for one problem."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import NOT_ASSESSED, SAFE, UNSAFE
from . import _engine
from ._console import (
    Activation,
    Checkpoint,
    Engine,
    EngineArgs,
    EnginePython,
    Experts,
    Format,
    Json,
    OutDtype,
    State,
    WhoseProfile,
    named,
    one_sentence,
    print_json,
    problem_of,
    refuse_engine_options,
    say_layer_status,
    say_lines,
    say_wrapped,
    status,
)


def choose(
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
    layer: Annotated[
        bool, typer.Option("--layer", help="Also the weight layout of (n, k), chosen over all m.")
    ] = False,
    checkpoint: Checkpoint = None,
    engine: Engine = None,
    engine_args: EngineArgs = "",
    python: EnginePython = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Print the stored choice for one problem, as an engine would read it."""
    with one_sentence():
        refuse_engine_options(ctx, engine)
        from ..autotune.verdict.profiles import PROFILES
        from ..engines import names
        from ..report import documents
        from ..report.brief import engines_for, named_instead
        from ..report.terminal.choice import choice_lines, decision_lines

        if profile is not None:
            named(PROFILES, profile, "profile")
        problem = problem_of(ctx, (m, n, k), experts)
        decision = documents.decision(state, problem, profile)
        verdict = _engine.assessed(engine, engine_args, state, profile=profile, python=python)
        decision["engine"] = verdict
        decision["layer"] = documents.layer(state, problem, profile) if layer else None
        decision["checkpoint"] = weights = (
            documents.for_checkpoint(state, checkpoint, decision, profile) if checkpoint else None
        )
        if as_json:
            print_json(decision)
        else:
            place = documents.place_of(state)
            found = status(place, profile=profile)
            say_layer_status(found, problem, profile, place, decision)
            say_wrapped((*decision_lines(decision), *choice_lines(decision, layer)))
            scope = documents.scope(state, profile)
            if scope is not None and decision["status"] == "safe":
                sm = names.sm_of(scope[0])
                if engine is None:
                    say_lines(engines_for([decision["backend"]], format_, sm, scope[2]))
                else:
                    others = documents.alternatives(state, problem, profile)
                    say_lines(named_instead(engine, others, format_, sm))
            _engine.print_assessed([verdict])
        if verdict is not None:
            raise typer.Exit(_engine.exit_code([verdict]))
        if decision["status"] == "safe":
            raise typer.Exit(UNSAFE if weights and weights["status"] == "broken" else SAFE)
        # Something was measured and nothing was safe, or nothing that still holds was measured.
        known_bad = decision["status"] in ("unproven", "quarantined")
        measured = known_bad and decision["recorded_backend"]
        raise typer.Exit(UNSAFE if measured else NOT_ASSESSED)
