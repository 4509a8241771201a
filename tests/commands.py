"""The command line, called in this process."""

from __future__ import annotations

import json

import schemas
from click.testing import Result
from typer.testing import CliRunner

from fp4tune.cli import app


def call(*arguments: object) -> Result:
    """``fp4tune`` with these arguments: its `exit_code`, `stdout`, `stderr` and `output`. What it
    prints as JSON is held against its schema."""
    words = [str(a) for a in arguments]
    done = CliRunner().invoke(app, words)
    if "--json" in words and done.stdout:
        schemas.hold(schemas.command_of(words), json.loads(done.stdout))
    return done
