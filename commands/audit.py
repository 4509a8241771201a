"""The command ``fp4tune audit``: static inspection of machine code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._console import Json, State, one_sentence, print_json, say, say_lines


def audit(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Libraries, objects, cubins, folders, installs. Default: this one."),
    ] = None,
    arch: Annotated[
        int | None, typer.Option(help="SM to audit for, e.g. 120. Default: the GPU here, else all.")
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Judge compiled FP4 GEMM modules by their machine code; needs no GPU."""
    with one_sentence():
        from ..probes.audit import text

        sm = text.arch(arch)  # before what takes seconds to import
        from ..autotune.publication import audited as kept
        from ..probes import audit as auditing

        reports = auditing.audit(paths or (), sm, text.progress())
        for remark in kept.remember(reports, state):
            say(f"fp4tune: {remark}", err=True)
        if as_json:
            print_json([report.json() for report in reports])
        else:
            say_lines(text.lines(reports))
        raise typer.Exit(text.exit_code(reports))
