"""The command ``fp4tune layers``: what of a checkpoint is FP4, in an engine's shapes."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import NOT_ASSESSED, SAFE, Refused
from ._console import ENGINES, Json, choice, one_sentence, print_json, say_lines


def layers(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A folder, a config.json, or a name in the local Hugging Face cache."),
    ],
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks the model is split over.")] = 1,
    engine: Annotated[
        str | None,
        choice(*ENGINES, help="Whose rules of fusion. Default: what both do."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the layers of a checkpoint: which are FP4, in which shapes, and which are probed."""
    with one_sentence():
        from ..probes.models import fusion
        from ..probes.models import layers as reading
        from ..report.terminal import layers as lines

        if engine is not None and engine not in fusion.ENGINES:
            raise Refused(f"there is no engine {engine!r}; there are {', '.join(fusion.ENGINES)}")
        found = reading.read_layers(checkpoint, tp, engine)
        if as_json:
            print_json(found.json())
        else:
            say_lines(lines.layer_table(found))
        if not found.any_fp4:
            raise Refused(found.nothing())
        raise typer.Exit(NOT_ASSESSED if found.stops else SAFE)
