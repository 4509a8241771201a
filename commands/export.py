"""The command ``fp4tune export``: what this node found, as one bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from ._console import Json, Sign, State, one_sentence, print_json, say


def export(
    out: Annotated[str, typer.Option(help="A file, or a folder or fsspec URL to put it in.")],
    sign: Sign = None,
    hostname: Annotated[bool, typer.Option(help="Say this machine's name in the bundle.")] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Write what this node found as one bundle, for a fleet store to take."""
    with one_sentence():
        from dataclasses import asdict

        from ..fleet import export as exporting

        done = exporting.export(state, out, sign, hostname)
        if as_json:
            print_json(asdict(done))
        else:
            rows = ", ".join(f"{count} {table}" for table, count in done.rows.items() if count)
            say(f"{done.path}: {done.bytes} bytes, node {done.node}, {rows or 'no rows'}")
        for reasons in done.skipped.values():
            for reason, count in reasons.items():
                say(f"fp4tune: {count} left out: {reason}", err=True)
