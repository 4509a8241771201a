"""The command ``fp4tune``: parses, calls, prints. What is printed is made in `autotune.tables`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .cache.errors import StateError
from .errors import NOT_ASSESSED, SAFE, UNSAFE, Refused

app = typer.Typer(
    name="fp4tune",
    help="Find, prove and remember the fastest safe FP4 GEMM backend of this GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

State = Annotated[
    Path | None,
    typer.Option(help="State directory; default FP4TUNE_STATE, else /var/lib/fp4tune, else XDG."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Gpu = Annotated[
    str | None,
    typer.Option(help="GPU index, 'all', or 'none' for the CPU. Default: GPU 0, else the CPU."),
]
Formats = Annotated[list[str] | None, typer.Option("--format", help="nvfp4 or mxfp4; repeatable.")]
OutDtype = Annotated[str, typer.Option(help="Output dtype: bf16 or fp16.")]


@app.command()
def probe(
    gpu: Gpu = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="Shapes of a known model; repeatable.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="Shapes from a Hugging Face config.json.")
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="One layer as N,K; repeatable.")] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks the model is split over.")] = 1,
    max_m: Annotated[
        int | None, typer.Option(help="Largest m; default 4096 on a GPU, 32 on a CPU.")
    ] = None,
    formats: Formats = None,
    activation: Annotated[
        list[str] | None, typer.Option(help="bf16 (W4A16) or fp4 (W4A4); default both.")
    ] = None,
    out_dtype: OutDtype = "bf16",
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend name or FILE.py:NAME; repeatable. Default: all."),
    ] = None,
    level: Annotated[str, typer.Option(help="quick, standard or soak.")] = "standard",
    profile: Annotated[
        str | None,
        typer.Option(help="strict, sglang or vllm. Default: the installed engine, else strict."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides all data and shapes; printed. Default: random.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter to run backends in, e.g. the engine's.")
    ] = None,
    hang_seconds: Annotated[
        float | None,
        typer.Option(help="Silence that counts as a hang; default 30, in a regime 6; CPU 120."),
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Run every backend here, check every element, time them, store the fastest safe one."""
    with _one_sentence():
        from .autotune import plan as planning
        from .autotune.levels import LEVELS
        from .autotune.probe import Plan
        from .autotune.probe import probe as run_probe
        from .autotune.profiles import PROFILES, installed
        from .cache.ledger import Ledger
        from .cache.state import directory
        from .probes import devices

        chosen_level = _named(LEVELS, level, "level")
        chosen_profile = _named(PROFILES, profile or installed(), "profile")
        targets = devices.select(gpu)
        state_dir = directory(state)
        chosen_seed = planning.seed(seed)
        plans = []
        for target in targets:
            layers = planning.layers(
                preset or (), model_config, shape or (), tp, target.device.kind
            )
            problems = planning.problems(
                layers,
                formats or ["nvfp4"],
                activation or ["bf16", "fp4"],
                out_dtype,
                planning.max_m(max_m, target),
            )
            plans.append(
                Plan(
                    target=target,
                    backends=planning.backends(backend or ()),
                    problems=problems,
                    level=chosen_level,
                    profile=chosen_profile,
                    seed=chosen_seed,
                    python=planning.interpreter(python),
                    hang_seconds=planning.hang_seconds(hang_seconds),
                    argv=tuple(sys.argv[1:]),
                )
            )
        from .autotune import standing, stored, tables
        from .autotune.publication import publish
        from .autotune.watching import watching

        standing.usable(state_dir)  # refuses now what could not be published over at the end
        reports = []
        with Ledger.open(state_dir) as ledger:
            for each in plans:
                with watching(each) as progress:
                    reports.append(run_probe(each, ledger, state_dir, progress))
        publish(reports, state_dir)
        if as_json:
            _print_json([stored.report_json(report) for report in reports])
        else:
            for report in reports:
                tables.print_report(report)
        statuses = {choice.status for report in reports for choice in report.choices}
        if not statuses:
            raise Refused("no backend could run any of these problems here; nothing is published")
        raise typer.Exit(UNSAFE if "none" in statuses else SAFE)


@app.command()
def choose(
    m: Annotated[int, typer.Argument(help="Rows of the activation: tokens in the batch.")],
    n: Annotated[int, typer.Argument(help="Outputs of the layer, on one rank.")],
    k: Annotated[int, typer.Argument(help="Inputs of the layer, on one rank.")],
    format_: Annotated[str, typer.Option("--format", help="nvfp4 or mxfp4.")] = "nvfp4",
    activation: Annotated[str, typer.Option(help="bf16 (W4A16) or fp4 (W4A4).")] = "bf16",
    out_dtype: OutDtype = "bf16",
    profile: Annotated[
        str | None, typer.Option(help="Whose choice, where several profiles were probed.")
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Print the stored choice for one problem, as an engine would read it."""
    with _one_sentence():
        from .autotune import stored
        from .autotune.profiles import PROFILES

        if profile is not None:
            _named(PROFILES, profile, "profile")
        decision = stored.decision(state, m, n, k, format_, activation, out_dtype, profile)
        if as_json:
            _print_json(decision)
        else:
            typer.echo(stored.decision_line(decision))
        if decision["status"] == "safe":
            raise typer.Exit(SAFE)
        # Something was measured and nothing was safe, or nothing that still holds was measured.
        measured = decision["status"] == "unproven" and decision["recorded_backend"]
        raise typer.Exit(UNSAFE if measured else NOT_ASSESSED)


@app.command()
def show(
    findings: Annotated[bool, typer.Option(help="List every finding.")] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Print what is stored: choices, verdicts with conditions, findings, environment."""
    with _one_sentence():
        from .autotune import stored, tables

        place = stored.place_of(state)
        if as_json:
            _print_json(stored.as_json(place))
        else:
            tables.print_stored(place, findings)


@app.command()
def backends(
    gpu: Gpu = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend name or FILE.py:NAME; repeatable. Default: all."),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter to ask in, e.g. the engine's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List every backend, what it supports on this device, and why not where it does not."""
    with _one_sentence():
        from .autotune import plan as planning
        from .autotune import support, tables
        from .probes import devices

        (target, *_) = devices.select(gpu)
        rows = support.rows(target, planning.backends(backend or ()), planning.interpreter(python))
        if as_json:
            _print_json({"device": target.name, "arch": target.device.arch, "backends": rows})
        else:
            tables.print_support(target, rows)


@app.command()
def audit(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Libraries, objects, cubins, folders, installs. Default: this one."),
    ] = None,
    arch: Annotated[
        int | None, typer.Option(help="SM to audit for, e.g. 120. Default: the GPU here, else all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge compiled FP4 GEMM modules by their machine code; needs no GPU."""
    with _one_sentence():
        from .probes import audit as auditing
        from .probes.audit import text

        reports = auditing.audit(paths or (), text.arch(arch), text.progress())
        if as_json:
            _print_json([report.json() for report in reports])
        else:
            typer.echo("\n".join(text.lines(reports)))
        raise typer.Exit(text.exit_code(reports))


@app.command()
def selftest(
    gpu: Gpu = None,
    mutant: Annotated[
        list[str] | None, typer.Option(help="A mutant's name; repeatable. Default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Probe backends that fail on purpose: what does this prober catch here?"""
    with _one_sentence():
        from .autotune import selftest as testing
        from .autotune.watching import watching
        from .probes import devices

        chosen = [(t, testing.choose(t.device.kind, mutant or ())) for t in devices.select(gpu)]
        results = [(t, testing.selftest(t, mutants, watching)) for t, mutants in chosen]
        if as_json:
            _print_json([testing.document(target, rows) for target, rows in results])
        else:
            for target, rows in results:
                testing.print_rows(target, rows)
        raise typer.Exit(testing.exit_code(row for _, rows in results for row in rows))


@app.command()
def doctor(state: State = None, as_json: Json = False) -> None:
    """Say what is here, what is missing, and what to do about it."""
    with _one_sentence():
        from .autotune import doctor as checks
        from .autotune import tables

        lines = checks.examine(state)
        if as_json:
            _print_json([line.json() for line in lines])
        else:
            tables.print_doctor(lines)
        raise typer.Exit(NOT_ASSESSED if any(line.status == "bad" for line in lines) else SAFE)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fp4tune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Exit codes: 0 a safe choice exists; 1 unsafe, or no safe choice; 2 could not assess."""


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Bad input and an unusable state end in one sentence and exit code 2, without a traceback."""
    try:
        yield
    except Refused as error:
        typer.echo(f"fp4tune: {error}", err=True)
        raise typer.Exit(error.code) from None
    except StateError as error:
        typer.echo(f"fp4tune: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except ValueError as error:
        typer.echo(f"fp4tune: {error}", err=True)
        raise typer.Exit(NOT_ASSESSED) from None
    except KeyboardInterrupt:
        typer.echo("fp4tune: interrupted; evidence so far is kept", err=True)
        raise typer.Exit(NOT_ASSESSED) from None


def _named(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise Refused(f"there is no {what} {name!r}; there are {', '.join(table)}")
    return table[name]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def main() -> None:
    """Entry point of the ``fp4tune`` command."""
    app(prog_name="fp4tune")


if __name__ == "__main__":
    main()
