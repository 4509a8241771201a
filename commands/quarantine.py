"""The commands ``fp4tune quarantine list``, ``add`` and ``lift``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import Refused
from ._console import (
    Activation,
    Format,
    Json,
    OutDtype,
    State,
    one_sentence,
    print_json,
    refuse_beside,
    say,
)
from ._help import Whole

app = typer.Typer(
    cls=Whole,
    help="List, add and lift quarantines: backends that must not be chosen.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_(state: State = None, as_json: Json = False) -> None:
    """Print what is quarantined, and where."""
    with one_sentence():
        from ..cache import quarantine_store

        place = _place(state)
        _collect(place)
        found, ignored = quarantine_store.read(quarantine_store.place(place))
        if as_json:
            print_json({"quarantines": [q.json() for q in found], "ignored": ignored})
            return
        for q in found:
            say(f"{q.id}  {q.where()}  by {q.by}: {q.reason or 'no reason given'}")
        if not found:
            say("nothing is quarantined")
        for sentence in ignored:
            say(f"fp4tune: {sentence}", err=True)


@app.command()
def add(
    ctx: typer.Context,
    backend: Annotated[str, typer.Argument(help="The backend that must not be chosen.")],
    tactic: Annotated[str | None, typer.Option(help="One tactic of it. Default: all.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="On one layer only, as N,K. Default: everywhere.")
    ] = None,
    m: Annotated[int | None, typer.Option(help="In the bucket of this m only.")] = None,
    format_: Format = "nvfp4",
    activation: Activation = "bf16",
    out_dtype: OutDtype = "bf16",
    reason: Annotated[str, typer.Option(help="Why, for those who read it later.")] = "",
    state: State = None,
    as_json: Json = False,
) -> None:
    """Quarantine a backend, for every engine on this node that reads this state."""
    with one_sentence():
        from ..cache import quarantine, quarantine_store
        from ..cache.errors import translate

        if m is not None and layer is None:
            raise Refused("--m says which bucket of a layer: say which layer, with --layer N,K")
        if layer is None:
            why = "says which problem of a layer: say which layer, with --layer N,K"
            refuse_beside(ctx, ["format_", "activation", "out_dtype"], why)
        n, k = _layer(layer) if layer else (0, 0)
        rows = _candidate_rows(state)
        known = {row["backend"] for row in rows}
        if backend not in known:
            from ..probes import registry

            registry.known(backend)
        prints = {row["fingerprint"] for row in rows if row["backend"] == backend}
        reach = quarantine.Reach(
            m or 0,
            n,
            k,
            "backend" if layer is None else "layer" if m is None else "bucket",
            format=format_,
            activation=activation,
            out_dtype=out_dtype,
        )
        entry = quarantine.make(
            backend,
            reach,
            tactic=tactic,
            fingerprint=next(iter(prints)) if len(prints) == 1 else None,
            reason=reason,
            by="operator",
        )
        place = _place(state)
        try:
            os.makedirs(place, 0o755, exist_ok=True)
        except OSError as error:
            raise translate(error, place) from None
        _collect(place)
        where = quarantine_store.write(entry, quarantine_store.place(place))
        if as_json:
            print_json(entry.json())
        else:
            say(f"{entry.where()} is quarantined as {entry.id} ({where})")


@app.command()
def lift(
    ids: Annotated[list[str], typer.Argument(help="As 'quarantine list' prints them.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Lift quarantines: the backends may be chosen again."""
    with one_sentence():
        from ..cache import dropbox, quarantine_store
        from ..fleet import taken

        place = _place(state)
        _collect(place)
        for identity in ids:
            quarantine_store.lift(identity, quarantine_store.place(place))
        taken.note_lifted(ids, Path(place))
        for identity in ids:
            dropbox.withdrawn(identity, place)
        if as_json:
            print_json({"lifted": ids})
        else:
            say(f"lifted {', '.join(ids)}")


def _place(state: Path | None) -> str:
    from ..cache import quarantine_store

    return quarantine_store.state_dir(os.fspath(state) if state else None)


def _collect(place: str) -> None:
    """Take up what was reported, for who may: the daemon may not be here to do so."""
    from ..cache import dropbox

    known = {str(row["backend"]) for row in _candidate_rows(Path(place))}
    for sentence in dropbox.collect(place, known):
        say(f"fp4tune: {sentence}", err=True)


def _candidate_rows(state: Path | None) -> list[dict[str, Any]]:
    from ..cache import reader
    from ..cache.errors import Missing

    try:
        return reader.open(state).rows("candidate")
    except Missing:
        return []


def _layer(text: str) -> tuple[int, int]:
    from ..probes.models.shapes import parse_shape

    return parse_shape(text)
