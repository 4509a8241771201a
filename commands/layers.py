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
        from ..cache.experts import option_text
        from ..probes.models import fusion
        from ..probes.models import layers as reading
        from ..probes.models.experts import experts_on_rank, left_out
        from ..report.terminal import layers as lines

        if engine is not None and engine not in fusion.ENGINES:
            raise Refused(f"there is no engine {engine!r}; there are {', '.join(fusion.ENGINES)}")
        found = reading.read_layers(checkpoint, tp, engine)
        routed = experts_on_rank(found)
        if as_json:
            whole = [{"format": p.format, "layer": option_text(p.row)} for p in routed]
            print_json({**found.json(), "experts": whole, "left_out": left_out(found)})
        else:
            say_lines(lines.layer_table(found))
            if routed:
                options = "; ".join(f"{option_text(p.row)} ({p.format})" for p in routed)
                say_lines([f"as --experts has them: {options}"])
            say_lines(left_out(found))
        if not found.any_fp4:
            raise Refused(found.nothing())
        raise typer.Exit(NOT_ASSESSED if found.stops else SAFE)
