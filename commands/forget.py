"""The command ``fp4tune forget``: take back what a probe made known."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import Refused
from ._console import Json, State, one_sentence, print_json, say


def forget(
    run: Annotated[str | None, typer.Option(help="What this run recorded.")] = None,
    backend: Annotated[str | None, typer.Option(help="The evidence of this backend.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="A layer, as N,K; of routed experts INTERMEDIATE,HIDDEN.")
    ] = None,
    finding: Annotated[
        int | None, typer.Option(help="One finding, as 'show --findings' numbers them.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; it stays in the ledger.")] = "",
    listed: Annotated[
        bool, typer.Option("--list", help="Print what was taken back, and why.")
    ] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Take back a run, a backend's evidence, a layer or a finding: it is measured anew."""
    with one_sentence():
        from dataclasses import asdict

        from ..autotune.publication import forget as forgetting
        from ..cache.ledger import Ledger
        from ..cache.rows import Forgotten
        from ..cache.state import directory
        from ..probes.models.shapes import parse_shape

        place = directory(state)
        if listed:
            if any(each is not None for each in (run, backend, layer, finding, reason or None)):
                raise Refused("--list prints what was taken back; it takes nothing back itself")
            with Ledger.open(place, readonly=True) as ledger:
                rows = ledger.forgotten()
            if as_json:
                print_json({"forgotten": [asdict(row) for row in rows], "generation": None})
                return
            for row in rows:
                say(f"{row.what}: {row.reason}")
            if not rows:
                say("nothing was taken back")
            return
        n, k = parse_shape(layer) if layer is not None else (None, None)
        wanted = Forgotten(reason, run, backend, n, k, finding)
        with Ledger.open(place, readonly=True):
            pass  # there must be one: none is made to take something back from
        done = forgetting.forget(place, wanted)
        if as_json:
            found = {**asdict(done.row), "covered": dict(done.covered)}
            print_json({"forgotten": [found], "generation": done.generation})
            return
        counts = ", ".join(f"{count} {table}" for table, count in done.covered.items() if count)
        say(f"taken back: {done.row.what} ({counts}): {done.row.reason}")
        if done.generation is not None:
            say(f"what was published of it is withdrawn; stored as generation {done.generation}")
