"""What every command shares: options for state and JSON, and how it ends where it cannot go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cache.errors import Corrupt, StateError, Unpublished
from ..errors import NOT_ASSESSED, Refused, printable
from ..machine.memory import is_out_of_memory
from ..words import MISSING, STATUS_WORDS, UNREADABLE

State = Annotated[
    Path | None,
    typer.Option(help="State directory; default FP4TUNE_STATE, else /var/lib/fp4tune, else XDG."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def choice(*names: str, flags: Sequence[str] = (), help: str) -> Any:
    """An option whose values are these: its help lists them, and a shell completes them."""
    return typer.Option(
        *flags, help=help, metavar=f"[{'|'.join(names)}]", autocompletion=lambda: [*names]
    )


FORMATS, ACTIVATIONS, DTYPES = ("nvfp4", "mxfp4"), ("bf16", "fp4"), ("bf16", "fp16")
ENGINES = ("sglang", "vllm")
PROFILES, LEVELS = ("strict", *ENGINES), ("quick", "standard", "soak")

Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="[INDEX|all|none]",
        autocompletion=lambda: ["0", "all", "none"],
        help="Which GPU, or none for the CPU. Default: GPU 0, else the CPU.",
    ),
]
Formats = Annotated[
    list[str] | None, choice(*FORMATS, flags=("--format",), help="FP4 format; repeatable.")
]
Format = Annotated[str, choice(*FORMATS, flags=("--format",), help="FP4 format.")]
Experts = Annotated[
    str | None,
    typer.Option(
        help="A layer of routed experts as E,TOP_K,INTERMEDIATE,HIDDEN, in place of N and K."
    ),
]
Activation = Annotated[str, choice(*ACTIVATIONS, help="bf16 is W4A16, fp4 is W4A4.")]
Level = Annotated[str, choice(*LEVELS, help="How much is launched and checked.")]
Profile = Annotated[
    str | None,
    choice(*PROFILES, help="How launches are made. Default: as the installed engine, else strict."),
]
WhoseProfile = Annotated[
    str | None, choice(*PROFILES, help="Whose choice, where several profiles were probed.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also print tables of all that was found.")
]
Engine = Annotated[
    str | None, choice(*ENGINES, help="Exit code 1 unless what this engine would run is safe.")
]
EngineArgs = Annotated[
    str, typer.Option(help="That engine's arguments, as one string, to see what it would run.")
]
EnginePython = Annotated[
    str | None,
    typer.Option("--python", help="That engine's interpreter. Default: the one that runs this."),
]
OutDtype = Annotated[str, choice(*DTYPES, help="Output dtype.")]
Sign = Annotated[Path | None, typer.Option(help="PEM file of an Ed25519 private key to sign with.")]
Keys = Annotated[
    Path | None, typer.Option(help="Trusted public keys: then nothing unsigned is taken.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Say whether these weights meet the conditions; see check-weights."),
]


class Ended(KeyboardInterrupt):
    """The process was told to end, by SIGTERM or SIGHUP: the same as Ctrl-C, and as orderly."""


@contextmanager
def ending() -> Iterator[None]:
    """While it lasts SIGTERM and SIGHUP end what runs as Ctrl-C does, so that workers are ended,
    the run is told to be interrupted and the cursor comes back."""

    def end(number: int, frame: object) -> None:
        raise Ended

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Who asked for a signal to be ignored, as nohup does, is heard.
    heard = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def given(ctx: typer.Context, *options: str) -> list[str]:
    """Those of a command's parameters that were given, be it with their default's value, as options
    are written."""
    said = []
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name in options and source is not None and source.name == "COMMANDLINE":
            said.append(parameter.opts[0])
    return said


def refuse_beside(ctx: typer.Context, options: Sequence[str], why: str) -> None:
    """Refuse options that were given and would do nothing, with a sentence about the first."""
    for option in given(ctx, *options):
        raise Refused(f"{option} {why}")


def problem_of(
    ctx: typer.Context,
    sizes: tuple[int, int | None, int | None],
    experts: str | None,
) -> Any:
    """The problem of (m, n, k), or of m tokens and ``--experts``, with the command's format,
    activation and output dtype. Raises Refused and ValueError, one sentence."""
    from ..autotune import request as planning
    from ..probes.problem import Problem

    m, n, k = sizes
    command, asked = ctx.info_name, ctx.params
    if experts is not None:
        if n is not None:
            raise Refused(f"{command} M --experts ...: N and K are in --experts already")
        why = "is of linear layers: what experts compute with is in --experts"
        refuse_beside(ctx, ["activation", "out_dtype"], why)
        (problem,) = planning.experts([experts], [asked["format_"]], (), 1)
        return problem.at(m)
    if n is None or k is None:
        raise Refused(f"{command} takes M, N and K, or M and --experts E,TOP_K,...")
    return Problem(asked["format_"], m, n, k, asked["activation"], asked["out_dtype"])


def refuse_engine_options(ctx: typer.Context, engine: str | None) -> None:
    """Refuse what says more of an engine where none is named."""
    if engine is None:
        why = "is what that engine is started with: say which, with --engine"
        refuse_beside(ctx, ["engine_args"], why)
        refuse_beside(ctx, ["python"], "is that engine's interpreter: say which, with --engine")


def program() -> str:
    """How fp4tune is called from where one is: its name, or its path where that is not on PATH."""
    mine = os.path.realpath(sys.argv[0]) if sys.argv and sys.argv[0] else ""
    found = shutil.which("fp4tune")
    if found and os.path.realpath(found) == mine or os.path.basename(mine) != "fp4tune":
        return "fp4tune"
    here = os.path.relpath(mine)
    return here if not here.startswith("..") else mine


@contextmanager
def one_sentence() -> Iterator[None]:
    """Bad input and an unusable state end in one sentence and exit code 2, without a traceback; so
    does a signal that ends the process."""
    try:
        with ending():
            yield
    except Refused as error:
        say(f"fp4tune: {error}", err=True)
        raise typer.Exit(error.code) from None
    except StateError as error:
        word = "DAMAGED: " if isinstance(error, Corrupt) else ""
        word = f"{STATUS_WORDS[MISSING]}: " if isinstance(error, Unpublished) else word
        say(f"fp4tune: {word}{error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except ValueError as error:
        say(f"fp4tune: {error}", err=True)
        raise typer.Exit(NOT_ASSESSED) from None
    except OSError as error:
        if error.errno == errno.EPIPE or error.strerror is None:
            raise  # whoever read what is printed has enough of it
        where = "" if error.filename is None else f"{error.filename}: "
        say(f"fp4tune: {where}{error.strerror}", err=True)
        raise typer.Exit(NOT_ASSESSED) from None
    except (MemoryError, ImportError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = "this host had no memory left, which says nothing of any backend; what was written"
        say(f"fp4tune: {text} so far is kept", err=True)
        raise typer.Exit(NOT_ASSESSED) from None
    except KeyboardInterrupt:
        say("fp4tune: interrupted; what was written so far is kept", err=True)
        raise typer.Exit(NOT_ASSESSED) from None


LONGEST_LINE = 1 << 16
"""Characters of a line that is printed: snippets for shells have long ones."""


def say(line: str, err: bool = False) -> None:
    """Print one line, in which nothing that a name holds is obeyed."""
    typer.echo(printable(line, LONGEST_LINE), err=err)


def say_lines(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def say_wrapped(lines: Iterable[str]) -> None:
    """Print sentences as wide as COLUMNS says or the terminal is, each further line of one set in;
    without either, a sentence is a line."""
    width = columns()
    for line in lines:
        text = printable(line, LONGEST_LINE)
        if width is None or len(text) <= width:
            say(text)
            continue
        options: Any = {"break_long_words": False, "break_on_hyphens": False}
        for part in textwrap.wrap(text, max(width, 20), subsequent_indent="  ", **options):
            say(part)


def columns() -> int | None:
    """How wide lines may be: as COLUMNS says or the terminal is; None where neither is there."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and len(said) < 6 and int(said):
        return int(said)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def status(
    state: Path | str | None, gpu: str | None = None, profile: str | None = None
) -> dict[str, Any]:
    """What this node is, as `facts` decides it and every command says first."""
    from ..cache import facts

    return facts.gather(state, gpu, profile)


def say_status(found: dict[str, Any], prefix: str = "") -> None:
    """The lines that every command begins with; `prefix` makes them comments."""
    from ..cache import facts_text

    lines = facts_text.headline(found)
    if prefix:
        say_lines(f"{prefix}{line}" for line in lines)
    else:
        say_wrapped(lines)


def say_layer_status(
    found: dict[str, Any],
    problem: Any,
    profile: str | None,
    state: Path | None,
    answer: Mapping[str, Any] | None = None,
) -> None:
    """The status of the layer of one problem, or the node's where that layer is not known; that of
    the `answer` at its m where the layer's is better."""
    from ..cache import facts, facts_text
    from ..cache.experts import layer_words

    p = problem
    shape = (p.format, p.activation, p.out_dtype, p.groups, p.n, p.k)
    layer = facts.of_layer(found, shape, profile)
    if layer is None:
        known = [each for scope in found["scopes"] for each in scope["by_layer"]]
        names = ("format", "activation", "out_dtype", "groups", "n", "k")
        if not known or any(shape == tuple(each[name] for name in names) for each in known):
            say_status(found)
            return
        words = layer_words(asdict(p))
        probe = facts.probe_command(
            _first_scope(found, profile), [dict(zip(names, shape, strict=True))]
        )
        probe = facts.at_place(probe, state)
        say_wrapped([f"UNPROVEN: {words} was not probed here", f"now: {probe}"])
        return
    words = layer_words(asdict(p))
    do = layer["do"]
    lines = [f"{facts_text.said(layer)} ({words}, generation {found['generation']})"]
    if answer is not None and layer["status"] == "safe" != answer["status"]:
        lines[0] = (
            f"{STATUS_WORDS[answer['status']]}: m={p.m} {words}: {answer['reason']}; of what was "
            f"probed, {layer['reason']}"
        )
        probe = facts.probe_command(_first_scope(found, profile), [layer])
        do = facts.at_place(f"{probe} --max-m {p.m}", state)
    lines += [found["elsewhere"]] if found["elsewhere"] else []
    lines += [f"{STATUS_WORDS[UNREADABLE]} ledger: {found['ledger']}"] if found["ledger"] else []
    lines += [f"now: {do or found['do']}"] if do or found["ledger"] else []
    say_wrapped(lines)


def _first_scope(found: dict[str, Any], profile: str | None) -> tuple[str, str, str]:
    """(arch, gpu, profile) of what is published, of this profile where there is such."""
    scopes = sorted(found["scopes"], key=lambda scope: scope["profile"] != profile)
    return scopes[0]["arch"], scopes[0]["gpu"], profile or scopes[0]["profile"]


def print_json(value: Any) -> None:
    """Print one document: ASCII, and what JSON leaves of its control characters escaped, too."""
    typer.echo(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def named(table: dict[str, Any], name: str, what: str) -> Any:
    """The entry of `table` called `name`. Raises Refused, naming those there are."""
    if name not in table:
        raise Refused(f"there is no {what} {name!r}; there are {', '.join(table)}")
    return table[name]
