"""The commands ``fp4tune emit`` and ``fp4tune quarantine``."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import Json, State, one_sentence, print_json
from ..errors import SAFE, UNSAFE, Refused

quarantine = typer.Typer(
    help="List, add and lift quarantines: backends that must not be chosen.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

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
        from . import emit as emitting

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
                typer.echo(emission.shell())
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
    from ..autotune.profiles import installed
    from . import emit as emitting
    from . import names, select, tactics

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
    from . import applied, names, select

    if engine not in names.ENGINES:
        raise Refused(f"there is no engine {engine!r}; there are {', '.join(names.ENGINES)}")
    reader = select.open_for(engine, state, arch=arch, gpu=gpu, profile=profile)
    return applied.assess(select.select(reader, engine), shlex.split(engine_args))


def print_assessed(documents: Sequence[dict[str, Any] | None]) -> None:
    from . import applied

    for document in documents:
        if document is not None:
            typer.echo(applied.line(document))


def exit_code(documents: Sequence[dict[str, Any] | None]) -> int:
    """0 where all that the engine would run is safe, 1 where it is not."""
    return SAFE if documents and all(d and d["safe"] for d in documents) else UNSAFE


@quarantine.command("list")
def list_(state: State = None, as_json: Json = False) -> None:
    """Print what is quarantined, and where."""
    with one_sentence():
        from ..cache import quarantine as quarantines

        found, ignored = quarantines.read(_spools(state))
        if as_json:
            print_json({"quarantines": [q.json() for q in found], "ignored": ignored})
            return
        for q in found:
            typer.echo(f"{q.id}  {q.where()}  by {q.by}: {q.reason or 'no reason given'}")
        if not found:
            typer.echo("nothing is quarantined")
        for sentence in ignored:
            typer.echo(f"fp4tune: {sentence}", err=True)


@quarantine.command()
def add(
    backend: Annotated[str, typer.Argument(help="The backend that must not be chosen.")],
    tactic: Annotated[str | None, typer.Option(help="One tactic of it. Default: all.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="On one layer only, as N,K. Default: everywhere.")
    ] = None,
    m: Annotated[int | None, typer.Option(help="In the bucket of this m only.")] = None,
    format_: Format = "nvfp4",
    activation: Annotated[str, typer.Option(help="bf16 (W4A16) or fp4 (W4A4).")] = "bf16",
    out_dtype: Annotated[str, typer.Option(help="Output dtype: bf16 or fp16.")] = "bf16",
    reason: Annotated[str, typer.Option(help="Why, for those who read it later.")] = "",
    state: State = None,
    as_json: Json = False,
) -> None:
    """Quarantine a backend, for every engine on this node that reads this state."""
    with one_sentence():
        from ..cache import quarantine as quarantines

        if m is not None and layer is None:
            raise Refused("--m says which bucket of a layer: say which layer, with --layer N,K")
        n, k = _layer(layer) if layer else (0, 0)
        rows = _published(state)
        known = {row["backend"] for row in rows}
        if backend not in known:
            from ..probes.backends import registry

            registry.known(backend)
        prints = {row["fingerprint"] for row in rows if row["backend"] == backend}
        entry = quarantines.make(
            backend,
            m or 0,
            n,
            k,
            tactic=tactic,
            scope="backend" if layer is None else "layer" if m is None else "bucket",
            format=format_,
            activation=activation,
            out_dtype=out_dtype,
            fingerprint=next(iter(prints)) if len(prints) == 1 else None,
            reason=reason,
            by="operator",
        )
        where = quarantines.write(entry, _spools(state)[-1])
        if as_json:
            print_json(entry.json())
        else:
            typer.echo(f"{entry.where()} is quarantined as {entry.id} ({where})")


@quarantine.command()
def lift(
    ids: Annotated[list[str], typer.Argument(help="As 'quarantine list' prints them.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Lift quarantines: the backends may be chosen again."""
    with one_sentence():
        from ..cache import quarantine as quarantines

        for identity in ids:
            quarantines.lift(identity, _spools(state))
        if as_json:
            print_json({"lifted": ids})
        else:
            typer.echo(f"lifted {', '.join(ids)}")


def _spools(state: Path | None) -> Sequence[str]:
    from ..cache import quarantine as quarantines

    return quarantines.spools(quarantines.state_dir(os.fspath(state) if state else None))


def _published(state: Path | None) -> list[dict[str, Any]]:
    from ..cache import reader
    from ..cache.errors import Missing

    try:
        return reader.open(state).rows("candidate")
    except Missing:
        return []


def _layer(text: str) -> tuple[int, int]:
    from ..probes.shapes import parse_shape

    shape = parse_shape(text)
    return shape.n, shape.k
