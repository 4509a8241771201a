"""The command line, called in this process."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from fp4tune.cli import app


def call(*arguments: object) -> Result:
    """``fp4tune`` with these arguments: its `exit_code`, `stdout`, `stderr` and `output`."""
    return CliRunner().invoke(app, [str(a) for a in arguments])
