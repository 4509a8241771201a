"""The commands ``fp4tune fleet ...``: many nodes as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import NOT_ASSESSED, SAFE, UNSAFE, Refused
from ._console import (
    Json,
    Keys,
    Sign,
    one_sentence,
    print_json,
    refuse_beside,
    say,
    say_lines,
)
from ._help import Whole

app = typer.Typer(
    cls=Whole,
    help="Many nodes as one: merge their bundles, report, advise, promote, probe a cluster.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Store = Annotated[str, typer.Argument(help="The fleet store: a folder or an fsspec URL.")]
Confidence = Annotated[float, typer.Option(help="Of every bound, between 0 and 1.")]


@app.command()
def merge(
    sources: Annotated[list[str], typer.Argument(help="Bundles, folders of them, or URLs.")],
    into: Annotated[str, typer.Option(help="The fleet store: a folder or an fsspec URL.")],
    keys: Keys = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes at most; default one for each core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check bundles and add those that verify to a fleet store."""
    with one_sentence():
        from ..fleet import merge as merging
        from ..fleet import signing

        trusted = signing.keys(keys) if keys else None
        done = merging.merge(sources, into, trusted, jobs)
        if as_json:
            print_json(done.json())
        else:
            say(
                f"{into}: {len(done.added)} bundles added with {done.rows} rows, "
                f"{done.known} known, {len(done.refused)} refused"
            )
            for row in done.refused:
                say(f"refused {row['source']}: {row['reason']}")
        raise typer.Exit(UNSAFE if done.refused else SAFE)


@app.command()
def report(
    store: Store,
    confidence: Confidence = 0.95,
    html: Annotated[
        Path | None, typer.Option(help="Also write it as one HTML file, a page to look at.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a fleet store holds: evidence by cohort, whose fault, who is slow, who disagrees."""
    with one_sentence():
        from ..fleet import report as reporting
        from ..report.terminal.fleet import fleet_lines

        found = reporting.report(store, confidence)
        written = None
        if html is not None:
            from ..report.page import fleet as looks
            from ..report.page import render

            written = render.write(html, looks.document(store, found))
        if as_json:
            print_json({**found, "html": written})
        else:
            say_lines(fleet_lines(found))
        if not found["bundles"]:
            raise typer.Exit(NOT_ASSESSED)
        raise typer.Exit(UNSAFE if found["suspect_gpus"] or found["suspect_builds"] else SAFE)


@app.command()
def advise(
    ctx: typer.Context,
    store: Store,
    out: Annotated[str, typer.Option(help="The file to write, or an fsspec URL.")],
    sign: Sign = None,
    max_loss: Annotated[
        float, typer.Option(help="Refuse where more than this share of nodes would lose a choice.")
    ] = 0.1,
    force: Annotated[bool, typer.Option(help="Publish all the same.")] = False,
    days: Annotated[float, typer.Option(help="Days until nodes refuse the file.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Publish advisories on broken builds, and the generation of choices, for nodes to import."""
    with one_sentence():
        from ..fleet import advise as advising

        if force:
            refuse_beside(ctx, ["max_loss"], "is the limit that --force passes over")
        document = advising.advise(store, out, sign, max_loss, force, days)
        if as_json:
            print_json(document)
        else:
            for advisory in document["advisories"]:
                say(f"{advisory['id']}: {advisory['text']}")
            say(f"{out}: {len(document['advisories'])} advisories")


@app.command()
def promote(
    ctx: typer.Context,
    store: Store,
    canary: Annotated[float, typer.Option(help="Per cent of nodes that try it first.")] = 5.0,
    max_change: Annotated[
        float, typer.Option(help="Refuse where more than this share of nodes would change.")
    ] = 0.1,
    force: Annotated[bool, typer.Option(help="Promote all the same.")] = False,
    as_json: Json = False,
) -> None:
    """Take a generation of choices one step on: candidate, canary, promoted."""
    with one_sentence():
        from ..fleet import promote as promoting

        if force:
            refuse_beside(ctx, ["max_change"], "is the limit that --force passes over")
        state = promoting.promote(store, canary, max_change, force)
        _print_generation(state, as_json)
        raise typer.Exit(UNSAFE if state["stage"] == "rolled back" else SAFE)


@app.command()
def rollback(
    store: Store,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "asked for",
    as_json: Json = False,
) -> None:
    """Take the newest generation of choices back."""
    with one_sentence():
        from ..fleet import promote as promoting

        _print_generation(promoting.rollback(store, reason), as_json)


def _print_generation(state: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(state)
        return
    why = f": {state['reason']}" if "reason" in state else ""
    say(f"generation {state['number']} is {state['stage']}{why}")
    say(f"{len(state['choices'])} choices")


@app.command()
def probe(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments of fp4tune probe.")
    ] = None,
    into: Annotated[str, typer.Option(help="The fleet store: a folder or an fsspec URL.")] = "",
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster; default the one this machine is in.")
    ] = None,
    limit: Annotated[float, typer.Option(help="Seconds for each task.")] = 3600.0,
    campaign: Annotated[
        str | None, typer.Option(help="What to resume by; default a digest of the arguments.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Probe every GPU of every node of a Ray cluster, and put what comes into a fleet store."""
    with one_sentence():
        from ..fleet import distributed

        if not into:
            raise Refused("--into says which fleet store to fill")
        order = distributed.Order(tuple(arguments or ()), limit, campaign=campaign)
        done = distributed.probe(into, order, address, lambda s: say(s, err=True))
        if as_json:
            print_json(done.json())
        else:
            say(
                f"campaign {done.campaign}: {len(done.done)} GPUs probed, {len(done.before)} "
                f"before, {len(done.failed)} failed"
            )
        raise typer.Exit(NOT_ASSESSED if done.failed else SAFE)
