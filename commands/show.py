"""The command ``fp4tune show``: what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _engine
from ._console import (
    Checkpoint,
    Engine,
    EngineArgs,
    EnginePython,
    Json,
    State,
    one_sentence,
    print_json,
    refuse_beside,
    refuse_engine_options,
    say_lines,
    say_status,
    status,
)


def show(
    ctx: typer.Context,
    findings: Annotated[bool, typer.Option(help="List every finding.")] = False,
    pictures: Annotated[
        Path | None, typer.Option(help="Also write the wrong tiles of each, as SVG, to a folder.")
    ] = None,
    checkpoint: Checkpoint = None,
    engine: Engine = None,
    engine_args: EngineArgs = "",
    python: EnginePython = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Print what is stored: choices, verdicts with conditions, findings, environment."""
    with one_sentence():
        refuse_engine_options(ctx, engine)
        if as_json:
            refuse_beside(ctx, ["findings"], "lists every finding, and --json has them all")
        from ..autotune import checkpoint_check
        from ..autotune.publication import published
        from ..report import documents
        from ..report.terminal.summary import print_stored

        place = documents.place_of(state)
        if pictures is not None:
            from ..autotune import reproduce as drawing

            drawing.pictures(documents.stored_findings(place)[0], pictures)
        verdict = _engine.assessed(engine, engine_args, place, python=python)
        weights = None if checkpoint is None else checkpoint_check.find(checkpoint, place)
        if as_json:
            print_json({**documents.as_json(place), "checkpoint": weights, "engine": verdict})
        else:
            stored = published.load(place)
            say_status(status(place))
            print_stored(place, stored, findings)
            if weights is not None:
                say_lines(checkpoint_check.report(weights))
            _engine.print_assessed([verdict])
        if verdict is not None:
            raise typer.Exit(_engine.exit_code([verdict]))
