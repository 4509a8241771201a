"""The command ``fp4tune import``: what the fleet knows, taken onto this node."""

from __future__ import annotations

from typing import Annotated

import typer

from ._console import Json, Keys, State, one_sentence, print_json


def import_(
    source: Annotated[str, typer.Argument(help="What fleet advise wrote: a file or a URL.")],
    keys: Keys = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Take the fleet's advisories (quarantined at once) and choices (verified by probe --prior)."""
    with one_sentence():
        from ..fleet import adopt, signing

        trusted = signing.keys(keys) if keys else None
        done = adopt.adopt(source, state, trusted)
        if as_json:
            print_json(done)
        else:
            typer.echo(
                f"{done['advisories']} advisories, {len(done['quarantined'])} new quarantines; "
                f"{done['priors']} choices to verify with fp4tune probe --prior"
            )
            for device in done["suspect_gpus"]:
                typer.echo(f"the fleet suspects {device} of this node")
