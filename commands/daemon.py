"""The command ``fp4tune daemon``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SAFE, Refused
from ._console import Json, State, one_sentence, print_json, say


def daemon(
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file; default FP4TUNE_CONFIG, else /etc/fp4tune/daemon.toml."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what is wrong with the configuration, and end.")
    ] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Stay on the node: see what went stale, probe it when a GPU is free, answer over HTTP."""
    with one_sentence():
        from dataclasses import replace

        try:
            from ..daemon import config as configuring
            from ..daemon.run import run
        except ModuleNotFoundError as error:
            raise Refused(f"the daemon needs {error.name}: pip install 'fp4tune[daemon]'") from None

        path = configuring.place(config)

        def load() -> configuring.DaemonConfig:
            found = configuring.load(path)
            return found if state is None else replace(found, state=str(state))

        loaded = load()
        if check:
            if as_json:
                print_json(asdict(loaded))
            else:
                layers = (
                    len(loaded.layers()) + len(loaded.experts())
                    or "the published, else the default,"
                )
                say(f"{path or 'the defaults'}: good; {layers} layers, state {loaded.state_dir}")
            raise typer.Exit(SAFE)
        if as_json:
            raise Refused("--json goes with --check; a running daemon answers over HTTP")
        raise typer.Exit(run(loaded, load))
