"""The command ``fp4tune reproduce``: a finding's launch again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import Refused
from ._console import Gpu, Json, State, one_sentence, print_json


def reproduce(
    finding: Annotated[int, typer.Argument(help="A finding's number, from show --findings.")],
    gpu: Gpu = None,
    backend: Annotated[
        str | None, typer.Option(help="The backend, where it is a file: FILE.py:NAME.")
    ] = None,
    times: Annotated[int, typer.Option(help="How often to make the launch again.")] = 20,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Also write a script and data that run without fp4tune; folder or .zip."),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter to run the backend in, e.g. the engine's.")
    ] = None,
    hang_seconds: Annotated[
        float | None, typer.Option(help="Silence that counts as a hang; default 30; CPU 120.")
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Make a finding's launch again, and bundle it for the maintainer of the backend."""
    with one_sentence():
        from ..machine import devices
        from ..probes.worker import nursery

        if times < 1:
            raise Refused(f"--times {times}: it must be at least 1")
        (target, *_) = devices.select(gpu)  # before what takes seconds to import
        nursery.warm(python)  # meanwhile
        from ..autotune import reproduce as again
        from ..autotune import request as planning
        from ..report import documents
        from ..report.terminal.reproduce import print_result

        found = again.load(documents.place_of(state), finding)
        result = again.reproduce(
            found,
            again.ReplayBackend(
                target,
                again.spec_of(found, backend),
                planning.interpreter(python),
                planning.hang_seconds(hang_seconds),
            ),
            lambda who, text: None,
            times,
            bundle,
        )
        if as_json:
            print_json(result.json())
        else:
            print_result(result)
        raise typer.Exit(result.exit_code)
