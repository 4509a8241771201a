"""The command ``fp4tune emit``: what makes an engine run the proven choice."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
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
    given,
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
    linear: bool = True
    """Whether linear layers are meant: not of a checkpoint whose FP4 is in its experts alone."""
    experts: tuple[str, ...] | None = ()
    """Layers of routed experts, as ``--experts`` has them; empty for all that were probed, and None
    of a checkpoint that has none."""
    experts_format: str | None = None
    """The format of the experts that are meant, where one was said."""


def emit(
    ctx: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="[sglang|vllm|flashinfer|env|json]",
            help="For what.",
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
    experts: Annotated[
        list[str] | None,
        typer.Option(
            help="Of routed experts only E,TOP_K,INTERMEDIATE,HIDDEN; repeatable. Default: all."
        ),
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
        choice(*SHARES, help="The plugins watch that many of the engine's GEMMs, too."),
    ] = None,
    on_fault: Annotated[
        str,
        choice(*ON_FAULT, help="With --watch, on a confirmed fault."),
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
            refuse_beside(ctx, ["experts"], "are the checkpoint's own where one is named")
        if target == "flashinfer":
            refuse_beside(ctx, ["experts"], "have no tactics that FlashInfer's files pin")
        if watch is None:
            why = "is for what --watch finds: say --watch few or --watch every"
            refuse_beside(ctx, ["on_fault"], why)
        else:
            _check_watch(target, watch, on_fault)
        asked = _Asked(format_, activation, arch, gpu_name, profile, state, python)
        asked = replace(
            asked,
            experts=tuple(_typed_layer(each, format_) for each in experts or ()),
            experts_format=format_ if given(ctx, "format_") else None,
        )
        if checkpoint is not None:
            asked = _of_checkpoint(checkpoint, asked)
        if target == "json":
            raise typer.Exit(_print_all(asked, explain))
        made = _emission(target, out, asked)
        if watch is not None:
            made = emitting.watched(made, watch, on_fault)
        if as_json:
            print_json(made.json())
        else:
            chosen = made.parts[0]
            say_status(status(state, chosen.gpu, chosen.profile), "# ")
            say_lines(made.shell().split("\n"))
        raise typer.Exit(_exit_code(made))


def _exit_code(made: Any) -> int:
    """0 where every part is proven, 2 where what the engine makes of one cannot be told."""
    return SAFE if made.proven else NOT_ASSESSED if made.unclear else UNSAFE


def _typed_layer(text: str, format_: str) -> str:
    """A layer of routed experts as it was typed in, as rows have it. Raises ValueError."""
    from ..autotune import request as planning
    from ..cache.experts import option_text

    (problem,) = planning.experts([text], [format_], (), 1)
    return str(option_text(asdict(problem)))


def _check_watch(target: str, watch: str, on_fault: str) -> None:
    """Raises Refused for words that are none, or that do nothing here."""
    if target not in ("sglang", "vllm", "env"):
        raise Refused(f"--watch is for sglang, vllm and env, not {target}")
    for option, word, words in (("watch", watch, SHARES), ("on-fault", on_fault, ON_FAULT)):
        if word not in words:
            raise Refused(f"--{option} is {', '.join(words[:-1])} or {words[-1]}, not {word!r}")


def _of_checkpoint(checkpoint: str, asked: _Asked) -> _Asked:
    """With the format of a checkpoint's FP4 layers, their activation where it is 16-bit, and its
    routed experts. Raises Refused where nothing in it is FP4."""
    from ..cache.experts import option_text
    from ..probes.models.experts import main_experts
    from ..probes.models.layers import read_layers

    found = read_layers(checkpoint)
    routed = main_experts(found)
    if not found.probed and not routed:
        raise Refused(found.nothing())
    formats = Counter(row.format for row in found.probed for _ in range(row.count))
    if not found.probed:
        formats.update(each.format for each in routed)
    weight_only = {row.activation for row in found.probed} == {"bf16"}
    return replace(
        asked,
        format=formats.most_common(1)[0][0],
        activation=asked.activation or ("bf16" if weight_only else None),
        linear=bool(found.probed),
        experts=tuple(str(option_text(each.row)) for each in routed) or None,
    )


def _reader_and_parts(engine: str, asked: _Asked) -> tuple[Any, Any, Any]:
    """(reader, selection of linear layers, selection of routed experts) for an engine; None for
    what was not probed. Raises Refused, and StateError where neither was."""
    from ..engines import installed, select

    home = installed.home(engine, asked.python).required()
    reader = select.open_for(
        engine, asked.state, arch=asked.arch, gpu=asked.gpu, profile=asked.profile
    )
    linear, experts, missing = None, None, None
    try:
        if asked.linear:
            linear = select.select(
                reader, engine, format=asked.format, activation=asked.activation, home=home
            )
    except Missing as error:
        missing = error
    try:
        if asked.experts is not None:
            experts = select.select_experts(
                reader, engine, format=asked.experts_format, layers=asked.experts, home=home
            )
    except Missing as error:
        missing = error if asked.experts or missing is None else missing
        if asked.experts or linear is None:
            raise missing from None
    if linear is None and experts is None and missing is not None:
        raise missing
    return reader, linear, experts


def _print_all(asked: _Asked, explain: bool) -> int:
    """Both engines' documents, and with `explain` what every engine calls our backends."""
    from ..engines import emit as emitting
    from ..engines import names, others

    documents: dict[str, Any] = {}
    codes = []
    for engine in names.ENGINES:
        try:
            _, linear, experts = _reader_and_parts(engine, asked)
        except (Refused, Missing) as error:
            documents[engine] = emitting.unknown(engine, str(error))
            codes.append(NOT_ASSESSED)
            continue
        made = emitting.emission(linear, experts)
        documents[engine] = made.json()
        codes.append(_exit_code(made))
    if explain:
        reader = others.reader_for(asked.state, asked.arch, asked.gpu, asked.profile)
        documents["explained"] = others.explained(reader)
    print_json(documents)
    return SAFE if SAFE in codes else UNSAFE if UNSAFE in codes else NOT_ASSESSED


def _emission(target: str, out: Path | None, asked: _Asked) -> Any:
    from ..engines import emit as emitting
    from ..engines import names, tactics

    engine = target if target in names.ENGINES else _beside(asked.python)
    reader, linear, experts = _reader_and_parts(engine, asked)
    made = emitting.emission(linear, experts)
    if target == engine:
        return made
    if target == "env":
        return emitting.plugin_environment(made)
    if linear is None:
        raise Refused("no linear layer was probed here: FlashInfer's files pin tactics of those")
    if out is None:
        raise Refused("FlashInfer's tactics are pinned by two files: say where with --out")
    made = emitting.flashinfer(reader, linear)
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
    """All of `files` as JSON, or none: each is put in place when all are written.

    What is written first has names that cannot be foreseen: others may make files in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: folder / f".{name}.{os.urandom(6).hex()}.writing" for name in files}
    try:
        for name, content in files.items():
            with beside[name].open("x", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
        for name in files:
            os.replace(beside[name], folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
