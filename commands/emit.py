"""The command ``fp4tune emit``: what makes an engine run the proven choice."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cache.errors import Missing
from ..errors import NOT_ASSESSED, SAFE, UNSAFE, Refused
from ..witness.plan import ON_FAULT, QUARANTINE, SHARES
from ._console import (
    ACTIVATIONS,
    PROFILES,
    EnginePython,
    Format,
    Json,
    State,
    choice,
    one_sentence,
    print_json,
    refuse_beside,
    say_lines,
    say_status,
    status,
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Whose choices, for which layers, and which interpreter's engine."""

    format: str
    activation: str | None
    arch: str | None
    gpu: str | None
    profile: str | None
    state: Path | None
    python: str | None


def emit(
    ctx: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="sglang, vllm, flashinfer, env or json.",
            autocompletion=lambda: ["sglang", "vllm", "flashinfer", "env", "json"],
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Directory for files, which flashinfer needs.")
    ] = None,
    format_: Format = "nvfp4",
    activation: Annotated[
        str | None, choice(*ACTIVATIONS, help="Default: fp4 from SM100 on, bf16 before.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="For the layers of this checkpoint: its format, and W4A16 if it is so."),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="For another machine, e.g. sm120. Default: the GPU here.")
    ] = None,
    gpu_name: Annotated[
        str | None, typer.Option(help="For another machine: the GPU's model.")
    ] = None,
    profile: Annotated[
        str | None, choice(*PROFILES, help="Whose choices. Default: the engine's, else strict.")
    ] = None,
    python: EnginePython = None,
    watch: Annotated[
        str | None,
        typer.Option(help="few or every: the plugins watch that many of the engine's GEMMs, too."),
    ] = None,
    on_fault: Annotated[
        str,
        typer.Option(help="With --watch, on a confirmed fault: log, quarantine or stop."),
    ] = QUARANTINE,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="With json: every engine's names for every backend, too."),
    ] = False,
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
        if explain and target != "json":
            raise Refused("--explain is for the target json")
        if target != "flashinfer":
            refuse_beside(ctx, ["out"], f"is where FlashInfer's files go; {target} has none")
        if checkpoint is not None:
            refuse_beside(ctx, ["format_"], "is the checkpoint's own where one is named")
            format_, activation = _checkpoint_kind(checkpoint, activation)
        _check_watch(target, watch, on_fault)
        asked = _Asked(format_, activation, arch, gpu_name, profile, state, python)
        if target == "json":
            raise typer.Exit(_print_all(asked, explain))
        made = _emission(target, out, asked)
        if watch is not None:
            made = emitting.watched(made, watch, on_fault)
        if as_json:
            print_json(made.json())
        else:
            chosen = made.selection
            say_status(status(state, chosen.gpu, chosen.profile), "# ")
            say_lines(made.shell().split("\n"))
        if made.selection.backend:
            raise typer.Exit(SAFE)
        raise typer.Exit(NOT_ASSESSED if made.selection.unclear else UNSAFE)


def _check_watch(target: str, watch: str | None, on_fault: str) -> None:
    """Raises Refused for words that are none, or that do nothing here."""
    if watch is None:
        if on_fault != QUARANTINE:
            raise Refused("--on-fault is for what --watch finds: say --watch few or --watch every")
        return
    if target not in ("sglang", "vllm", "env"):
        raise Refused(f"--watch is for sglang, vllm and env, not {target}")
    for option, word, words in (("watch", watch, SHARES), ("on-fault", on_fault, ON_FAULT)):
        if word not in words:
            raise Refused(f"--{option} is {', '.join(words[:-1])} or {words[-1]}, not {word!r}")


def _checkpoint_kind(checkpoint: str, activation: str | None) -> tuple[str, str | None]:
    """The format of a checkpoint's dense FP4 layers, and their activation where it is 16-bit."""
    from ..probes.models.layers import read_layers

    found = read_layers(checkpoint)
    if not found.probed:
        raise Refused(found.nothing())
    formats = Counter(row.format for row in found.probed for _ in range(row.count))
    weight_only = {row.activation for row in found.probed} == {"bf16"}
    return formats.most_common(1)[0][0], activation or ("bf16" if weight_only else None)


def _reader_and_selection(engine: str, asked: _Asked) -> tuple[Any, Any]:
    """(reader, selection) for an engine. Raises Refused, StateError."""
    from ..engines import installed, select

    home = installed.home(engine, asked.python).required()
    reader = select.open_for(
        engine, asked.state, arch=asked.arch, gpu=asked.gpu, profile=asked.profile
    )
    chosen = select.select(
        reader, engine, format=asked.format, activation=asked.activation, home=home
    )
    return reader, chosen


def _print_all(asked: _Asked, explain: bool) -> int:
    """Both engines' documents, and with `explain` what every engine calls our backends."""
    from ..engines import emit as emitting
    from ..engines import names, others

    documents: dict[str, Any] = {}
    codes = []
    for engine in names.ENGINES:
        try:
            selection = _reader_and_selection(engine, asked)[1]
        except (Refused, Missing) as error:
            documents[engine] = emitting.unknown(engine, str(error))
            codes.append(NOT_ASSESSED)
            continue
        documents[engine] = emitting.emission(selection).json()
        unclear = NOT_ASSESSED if selection.unclear else UNSAFE
        codes.append(SAFE if selection.backend else unclear)
    if explain:
        reader = others.reader_for(asked.state, asked.arch, asked.gpu, asked.profile)
        documents["explained"] = others.explained(reader)
    print_json(documents)
    return SAFE if SAFE in codes else UNSAFE if UNSAFE in codes else NOT_ASSESSED


def _emission(target: str, out: Path | None, asked: _Asked) -> Any:
    from ..engines import emit as emitting
    from ..engines import names, tactics

    engine = target if target in names.ENGINES else _beside(asked.python)
    reader, selection = _reader_and_selection(engine, asked)
    if target == engine:
        return emitting.emission(selection)
    if target == "env":
        return emitting.plugin_environment(selection)
    if out is None:
        raise Refused("FlashInfer's tactics are pinned by two files: say where with --out")
    made = emitting.flashinfer(reader, selection)
    write(dict(made.files), out)
    env = {
        tactics.VARIABLE: os.path.abspath(out / tactics.BLOCKLIST),
        "FP4TUNE_FLASHINFER_CACHE": os.path.abspath(out / tactics.CACHE),
    }
    return replace(made, env=env)


def _beside(python: str | None) -> str:
    """The engine that is installed there; SGLang where both are, or none."""
    from ..engines import installed, names

    there = [name for name in names.ENGINES if installed.home(name, python).source.there]
    return there[0] if there else names.ENGINES[0]


def write(files: dict[str, Any], folder: Path) -> None:
    """All of `files` as JSON, or none: each is put in place when all are written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f".{name}").write_text(json.dumps(content, indent=1), encoding="utf-8")
    for name in files:
        os.replace(folder / f".{name}", folder / name)
