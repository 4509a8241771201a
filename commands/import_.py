"""The command ``fp4tune import``: what the fleet knows, taken onto this node."""

from __future__ import annotations

from typing import Annotated

import typer

from ._console import Json, Keys, State, one_sentence, print_json, say


def import_(
    source: Annotated[str, typer.Argument(help="What fleet advise wrote: a file or a URL.")],
    keys: Keys = None,
    again: Annotated[
        bool, typer.Option("--again", help="Quarantine also what was lifted on this node.")
    ] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Take the fleet's advisories (quarantined at once) and choices (verified by probe --prior)."""
    with one_sentence():
        from ..fleet import adopt, signing

        trusted = signing.keys(keys) if keys else None
        done = adopt.adopt(source, state, trusted, again)
        if as_json:
            print_json(done)
        else:
            say(
                f"{done['advisories']} advisories, {len(done['quarantined'])} new quarantines; "
                f"{done['priors']} choices to verify with fp4tune probe --prior"
            )
            for advisory in done["lifted_here"]:
                say(f"advisory {advisory} was lifted here and stays so; --again takes it")
            for device in done["suspect_gpus"]:
                say(f"the fleet suspects {device} of this node")
