"""What every command shares: options for state and JSON, and how it ends where it cannot go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .cache.errors import StateError
from .errors import NOT_ASSESSED, Refused

State = Annotated[
    Path | None,
    typer.Option(help="State directory; default FP4TUNE_STATE, else /var/lib/fp4tune, else XDG."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Bad input and an unusable state end in one sentence and exit code 2, without a traceback."""
    try:
        yield
    except Refused as error:
        typer.echo(f"fp4tune: {error}", err=True)
        raise typer.Exit(error.code) from None
    except StateError as error:
        typer.echo(f"fp4tune: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except ValueError as error:
        typer.echo(f"fp4tune: {error}", err=True)
        raise typer.Exit(NOT_ASSESSED) from None
    except KeyboardInterrupt:
        typer.echo("fp4tune: interrupted; evidence so far is kept", err=True)
        raise typer.Exit(NOT_ASSESSED) from None


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
