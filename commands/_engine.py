"""What ``--engine`` adds to commands: what the engine would run, and whether that is proven."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..cache.rows import Environment
from ..errors import NOT_ASSESSED, SAFE, UNSAFE
from ._console import say


def assessed(
    engine: str | None,
    engine_args: str,
    state: Path | None,
    arch: str | None = None,
    gpu: str | None = None,
    profile: str | None = None,
    python: str | None = None,
) -> dict[str, Any] | None:
    """The document of ``--engine``; None without it. Raises Refused, StateError."""
    if engine is None:
        return None
    from ..engines import applied, installed, select

    home = installed.home(engine, python).required()
    reader = select.open_for(engine, state, arch=arch, gpu=gpu, profile=profile)
    found = select.parts(reader, engine, home=home)
    return applied.together([applied.assess(each, shlex.split(engine_args)) for each in found])


def warn_of_other_versions(
    profile: str, python: str | None, environments: Iterable[Environment]
) -> None:
    """Say on stderr where what was measured differs from what that engine is served with."""
    from ..engines import installed, names, stack

    if profile not in names.ENGINES:
        return
    versions: dict[str, str] = {}
    for environment in environments:
        versions |= environment.facts.get("distributions") or {}
    versions.pop("python", None)
    for sentence in stack.warnings(installed.home(profile, python), versions):
        say(f"fp4tune: {sentence}", err=True)


def print_assessed(documents: Sequence[dict[str, Any] | None]) -> None:
    from ..engines import applied

    for document in documents:
        for each in applied.parts(document) if document is not None else ():
            say(applied.line(each))


def exit_code(documents: Sequence[dict[str, Any] | None]) -> int:
    """0 where all that the engine would run is safe, 1 where some of it is not, 2 where that
    cannot be told."""
    from ..engines import applied

    said = [each["safe"] for d in documents if d for each in applied.parts(d)]
    said += [False] * sum(d is None for d in documents)
    if said and all(said):
        return SAFE
    return UNSAFE if not said or False in said else NOT_ASSESSED
