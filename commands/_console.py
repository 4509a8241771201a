"""What every command shares: options for state and JSON, and how it ends where it cannot go on."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cache.errors import StateError
from ..errors import NOT_ASSESSED, Refused, printable

State = Annotated[
    Path | None,
    typer.Option(help="State directory; default FP4TUNE_STATE, else /var/lib/fp4tune, else XDG."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Gpu = Annotated[
    str | None,
    typer.Option(help="GPU index, 'all', or 'none' for the CPU. Default: GPU 0, else the CPU."),
]
Formats = Annotated[list[str] | None, typer.Option("--format", help="nvfp4 or mxfp4; repeatable.")]
Engine = Annotated[
    str | None, typer.Option(help="sglang or vllm: exit code 1 unless what it would run is safe.")
]
EngineArgs = Annotated[
    str, typer.Option(help="That engine's arguments, as one string, to see what it would run.")
]
EnginePython = Annotated[
    str | None,
    typer.Option("--python", help="That engine's interpreter. Default: the one that runs this."),
]
OutDtype = Annotated[str, typer.Option(help="Output dtype: bf16 or fp16.")]
Sign = Annotated[Path | None, typer.Option(help="PEM file of an Ed25519 private key to sign with.")]
Keys = Annotated[
    Path | None, typer.Option(help="Trusted public keys: then nothing unsigned is taken.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Say whether these weights meet the conditions; see check-weights."),
]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Bad input, an unusable state and files that cannot be used end in one sentence and exit code
    2, without a traceback."""
    try:
        yield
    except Refused as error:
        say(f"fp4tune: {error}", err=True)
        raise typer.Exit(error.code) from None
    except StateError as error:
        say(f"fp4tune: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except ValueError as error:
        say(f"fp4tune: {error}", err=True)
        raise typer.Exit(NOT_ASSESSED) from None
    except OSError as error:
        if error.errno == errno.EPIPE or error.strerror is None:
            raise  # whoever read what is printed has enough of it
        where = "" if error.filename is None else f"{error.filename}: "
        say(f"fp4tune: {where}{error.strerror}", err=True)
        raise typer.Exit(NOT_ASSESSED) from None
    except KeyboardInterrupt:
        say("fp4tune: interrupted; evidence so far is kept", err=True)
        raise typer.Exit(NOT_ASSESSED) from None


LONGEST_LINE = 1 << 16
"""Characters of a line that is printed: snippets for shells have long ones."""


def say(line: str, err: bool = False) -> None:
    """Print one line, in which nothing that a name holds is obeyed."""
    _print(printable(line, LONGEST_LINE), err)


def _print(text: str, err: bool = False) -> None:
    """Print to whoever reads. Where they have left, as ``head`` does, nobody is told any more, and
    the command ends with its own exit code: that of a broken pipe would be a verdict's."""
    try:
        typer.echo(text, err=err)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.stderr if err else sys.stdout).fileno())
        os.close(nowhere)


def say_lines(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def print_json(value: Any) -> None:
    """Print one document: ASCII, and what JSON leaves of its control characters escaped, too."""
    _print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def named(table: dict[str, Any], name: str, what: str) -> Any:
    """The entry of `table` called `name`. Raises Refused, naming those there are."""
    if name not in table:
        raise Refused(f"there is no {what} {name!r}; there are {', '.join(table)}")
    return table[name]
