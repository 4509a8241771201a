"""The command ``fp4tune facts``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SAFE
from ._console import PROFILES, Json, State, choice, one_sentence, refuse_beside, say_wrapped


def facts(
    ctx: typer.Context,
    format_: Annotated[
        str,
        choice("text", "ansible", "nfd", "textfile", flags=("--format",), help="What it prints."),
    ] = "text",
    out: Annotated[
        Path | None, typer.Option(help="Put it into this file, by a rename, instead of stdout.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="One line; the exit code says what it is.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="Only this GPU model, by its name.")] = None,
    profile: Annotated[str | None, choice(*PROFILES, help="Only this profile's choices.")] = None,
    expires: Annotated[float, typer.Option(help="Seconds that labels of nfd hold.")] = 3600.0,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Sum up what engines are answered here, for inventories and health checks."""
    with one_sentence():
        if check or as_json:
            other = "--check" if check else "--json"
            refuse_beside(ctx, ["format_"], f"is one form and {other} another: name one of them")
        if format_ != "nfd":
            refuse_beside(ctx, ["expires"], "is how long labels of --format nfd hold")
        from ..cache import facts as gathering
        from ..cache import facts_text

        if check:
            gathering.ask_driver()
        found = gathering.gather(state, gpu, profile)
        form = "json" if as_json else "line" if check else format_
        if form == "text" and out is None:
            say_wrapped(facts_text.text_lines(found))
        else:
            facts_text.put(facts_text.render(found, form, expires), out)
        raise typer.Exit(gathering.EXIT[found["status"]] if check else SAFE)
