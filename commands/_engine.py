"""What ``--engine`` adds to commands: what the engine would run, and whether that is proven."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SAFE, UNSAFE, Refused
from ._console import say


def assessed(
    engine: str | None,
    engine_args: str,
    state: Path | None,
    arch: str | None = None,
    gpu: str | None = None,
    profile: str | None = None,
) -> dict[str, Any] | None:
    """The document of ``--engine``; None without it. Raises Refused, StateError."""
    if engine is None:
        return None
    from ..engines import applied, names, select

    if engine not in names.ENGINES:
        raise Refused(f"there is no engine {engine!r}; there are {', '.join(names.ENGINES)}")
    reader = select.open_for(engine, state, arch=arch, gpu=gpu, profile=profile)
    return applied.assess(select.select(reader, engine), shlex.split(engine_args))


def print_assessed(documents: Sequence[dict[str, Any] | None]) -> None:
    from ..engines import applied

    for document in documents:
        if document is not None:
            say(applied.line(document))


def exit_code(documents: Sequence[dict[str, Any] | None]) -> int:
    """0 where all that the engine would run is safe, 1 where it is not."""
    return SAFE if documents and all(d and d["safe"] for d in documents) else UNSAFE
