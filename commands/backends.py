"""The command ``fp4tune backends``: which backends there are."""

from __future__ import annotations

from typing import Annotated

import typer

from ..cache.errors import StateError
from ._console import Gpu, Json, State, one_sentence, print_json, say


def backends(
    gpu: Gpu = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend name or FILE.py:NAME; repeatable. Default: all."),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter to ask in, e.g. the engine's.")
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """List every backend, what it supports on this device, and why not where it does not."""
    with one_sentence():
        from ..machine import devices
        from ..probes.worker import nursery

        (target, *_) = devices.select(gpu)  # before what takes seconds to import
        nursery.warm(python)  # meanwhile
        from ..autotune import request as planning
        from ..autotune import support
        from ..probes import registry
        from ..report.terminal import tables

        for plugin in registry.misnamed():
            say(f"fp4tune: the plugin {plugin.name} is left out: {plugin.reason}", err=True)
        try:
            last = support.outcomes(target, state)
        except StateError as error:
            if state is not None:
                raise
            say(f"fp4tune: {error}", err=True)  # what can run here does not depend on it
            last = {}
        asked = planning.backends(backend) if backend else planning.everyone()
        rows = support.rows(target, asked, planning.interpreter(python), last)
        if as_json:
            print_json({"device": target.name, "arch": target.device.arch, "backends": rows})
        else:
            tables.print_support(target, rows)
