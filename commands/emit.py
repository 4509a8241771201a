"""The command ``fp4tune emit``: what makes an engine run the proven choice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SAFE, UNSAFE, Refused
from ._console import Json, State, one_sentence, print_json, say_lines

Format = Annotated[str, typer.Option("--format", help="nvfp4 or mxfp4.")]


def emit(
    target: Annotated[str, typer.Argument(help="sglang, vllm, flashinfer, env or json.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for files, which flashinfer needs.")
    ] = None,
    format_: Format = "nvfp4",
    activation: Annotated[
        str | None,
        typer.Option(help="bf16 or fp4. Default: fp4 from SM100 on, bf16 before."),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="For another machine, e.g. sm120. Default: the GPU here.")
    ] = None,
    gpu_name: Annotated[
        str | None, typer.Option(help="For another machine: the GPU's model.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Whose choices. Default: the engine's, else strict.")
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Print what makes an engine run the proven choice, and what that rests on."""
    with one_sentence():
        from ..engines import emit as emitting

        if target not in emitting.TARGETS:
            raise Refused(
                f"there is no emission for {target!r}; there are {', '.join(emitting.TARGETS)}"
            )
        scope = {"arch": arch, "gpu": gpu_name, "profile": profile}
        made = _emissions(target, out, format_, activation, scope, state)
        if as_json or target == "json":
            documents = {name: emission.json() for name, emission in made.items()}
            print_json(documents if target == "json" else documents[target])
        else:
            for emission in made.values():
                say_lines(emission.shell().split("\n"))
        found = any(emission.selection.backend for emission in made.values())
        raise typer.Exit(SAFE if found else UNSAFE)


def _emissions(
    target: str,
    out: Path | None,
    format_: str,
    activation: str | None,
    scope: dict[str, str | None],
    state: Path | None,
) -> dict[str, Any]:
    from ..autotune.verdict.profiles import installed
    from ..engines import emit as emitting
    from ..engines import names, select, tactics

    def chosen(engine: str) -> tuple[Any, Any]:
        reader = select.open_for(
            engine, state, arch=scope["arch"], gpu=scope["gpu"], profile=scope["profile"]
        )
        return reader, select.select(reader, engine, format=format_, activation=activation)

    here = installed()
    engine = here if here in names.ENGINES else "sglang"
    if target == "json":
        return {name: emitting.emission(chosen(name)[1]) for name in names.ENGINES}
    if target in names.ENGINES:
        return {target: emitting.emission(chosen(target)[1])}
    reader, selection = chosen(engine)
    if target == "env":
        env = emitting.environment(selection) if selection.backend else {}
        return {target: emitting.Emission(selection, [], env, emitting.evidence(selection))}
    if out is None:
        raise Refused("FlashInfer's tactics are pinned by two files: say where with --out")
    emission = emitting.flashinfer(reader, selection)
    write(emission.files, out)
    emission.env[tactics.VARIABLE] = os.path.abspath(out / tactics.BLOCKLIST)
    emission.env["FP4TUNE_FLASHINFER_CACHE"] = os.path.abspath(out / tactics.CACHE)
    return {target: emission}


def write(files: dict[str, Any], folder: Path) -> None:
    """All of `files` as JSON, or none: each is put in place when all are written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f".{name}").write_text(json.dumps(content, indent=1), encoding="utf-8")
    for name in files:
        os.replace(folder / f".{name}", folder / name)
