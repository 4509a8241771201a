"""The command ``fp4tune``: parses, calls, prints. What is printed is made in `autotune.tables`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .autotune import commands as choice_commands
from .cache import commands as cache_commands
from .console import Json, State
from .console import one_sentence as _one_sentence
from .console import print_json as _print_json
from .daemon import commands as daemon_commands
from .engines import commands as engine_commands
from .errors import NOT_ASSESSED, SAFE, UNSAFE, Refused
from .fleet import commands as fleet_commands
from .report import commands as report_commands

app = typer.Typer(
    name="fp4tune",
    help="Find, prove and remember the fastest safe FP4 GEMM backend of this GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Gpu = Annotated[
    str | None,
    typer.Option(help="GPU index, 'all', or 'none' for the CPU. Default: GPU 0, else the CPU."),
]
Formats = Annotated[list[str] | None, typer.Option("--format", help="nvfp4 or mxfp4; repeatable.")]
Engine = Annotated[
    str | None, typer.Option(help="sglang or vllm: exit code 1 unless what it would run is safe.")
]
EngineArgs = Annotated[
    str, typer.Option(help="That engine's arguments, as one string, to see what it would run.")
]
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
    max_failure_rate: Annotated[
        float | None,
        typer.Option(help="Launch until each regime bounds the rate so; soak: 1e-4, else none."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of every bound, between 0 and 1.")] = 0.95,
    max_seconds: Annotated[
        float, typer.Option(help="Most seconds spent on --max-failure-rate, backends added up.")
    ] = 3600.0,
    max_launches: Annotated[
        int | None, typer.Option(help="Most launches of a kernel in a regime to the same end.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure what earlier probes made known, too.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(help="Most seconds of the probe: the fastest are tried until two are proven."),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter to run backends in, e.g. the engine's.")
    ] = None,
    hang_seconds: Annotated[
        float | None,
        typer.Option(help="Silence that counts as a hang; default 30, in a regime 6; CPU 120."),
    ] = None,
    traffic: Annotated[
        str | None,
        typer.Option(help="Weighs m for the weight layout: decode, prefill, mixed, or a file."),
    ] = None,
    prior: Annotated[
        bool, typer.Option(help="Verify the fleet's choices only, where import brought any.")
    ] = False,
    engine: Engine = None,
    engine_args: EngineArgs = "",
    state: State = None,
    as_json: Json = False,
) -> None:
    """Run every backend here, check every element, time them, store the fastest safe one."""
    with _one_sentence():
        from .autotune import plan as planning
        from .autotune import traffic as distributions
        from .autotune.levels import LEVELS
        from .autotune.probe import Plan
        from .autotune.profiles import PROFILES, installed
        from .cache.ledger import Ledger
        from .cache.state import directory
        from .probes import devices, quantisers

        chosen_level = _named(LEVELS, level, "level")
        chosen_profile = _named(PROFILES, profile or engine or installed(), "profile")
        targets = devices.select(gpu)
        state_dir = directory(state)
        weighed = {chosen_profile.name: distributions.find(traffic)} if traffic else {}
        chosen_seed = planning.seed(seed)
        rate = planning.failure_rate(max_failure_rate, confidence)
        planning.budget(max_seconds, max_launches)
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
            wanted = tuple(backend or ())
            if prior and not backend:
                wanted = planning.prior(state_dir, target, chosen_profile.name, problems)
            plans.append(
                Plan(
                    target=target,
                    backends=planning.backends(wanted),
                    quantisers=() if wanted else quantisers.names(),
                    problems=problems,
                    level=chosen_level,
                    profile=chosen_profile,
                    seed=chosen_seed,
                    python=planning.interpreter(python),
                    hang_seconds=planning.hang_seconds(hang_seconds),
                    argv=tuple(sys.argv[1:]),
                    rate=rate,
                    confidence=confidence,
                    max_seconds=max_seconds,
                    max_launches=max_launches,
                    budget=planning.time_budget(budget),
                    again=again,
                    seed_given=seed is not None,
                )
            )
        from .autotune import standing, stored, tables
        from .autotune.publication import publish
        from .autotune.several import probe_all
        from .autotune.watching import watching_all

        standing.usable(state_dir)  # refuses now what could not be published over at the end
        with Ledger.open(state_dir) as ledger, watching_all(plans) as progress:
            reports, failed = probe_all(plans, ledger, state_dir, progress)
        publish(reports, state_dir, weighed)
        verdicts = [
            engine_commands.assessed(
                engine, engine_args, state_dir, arch=r.target.device.arch, gpu=r.target.name
            )
            for r in reports
            if r.candidates
        ]
        if as_json:
            _print_json([{**stored.report_json(r), "engine": engine and verdicts} for r in reports])
        else:
            for report in reports:
                tables.print_report(report)
            engine_commands.print_assessed(verdicts)
        for label, error in failed.items():
            typer.echo(f"fp4tune: {label} could not be probed: {error}", err=True)
        statuses = {choice.status for report in reports for choice in report.choices}
        if not statuses:
            raise Refused("no backend could run any of these problems here; nothing is published")
        if failed:
            raise typer.Exit(NOT_ASSESSED)
        if engine is not None:
            raise typer.Exit(engine_commands.exit_code(verdicts))
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
    layer: Annotated[
        bool, typer.Option("--layer", help="Also the weight layout of (n, k), chosen over all m.")
    ] = False,
    checkpoint: choice_commands.Checkpoint = None,
    engine: Engine = None,
    engine_args: EngineArgs = "",
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
        verdict = engine_commands.assessed(engine, engine_args, state, profile=profile)
        decision["engine"] = verdict
        decision["layer"] = (
            stored.layer(state, n, k, format_, activation, out_dtype, profile) if layer else None
        )
        decision["checkpoint"] = weights = (
            stored.for_checkpoint(state, checkpoint, decision, profile) if checkpoint else None
        )
        if as_json:
            _print_json(decision)
        else:
            typer.echo(stored.decision_line(decision))
            for line in stored.choice_lines(decision, layer):
                typer.echo(line)
            engine_commands.print_assessed([verdict])
        if verdict is not None:
            raise typer.Exit(engine_commands.exit_code([verdict]))
        if decision["status"] == "safe":
            raise typer.Exit(UNSAFE if weights and weights["status"] == "broken" else SAFE)
        # Something was measured and nothing was safe, or nothing that still holds was measured.
        known_bad = decision["status"] in ("unproven", "quarantined")
        measured = known_bad and decision["recorded_backend"]
        raise typer.Exit(UNSAFE if measured else NOT_ASSESSED)


@app.command()
def show(
    findings: Annotated[bool, typer.Option(help="List every finding.")] = False,
    pictures: Annotated[
        Path | None, typer.Option(help="Also write the wrong tiles of each, as SVG, to a folder.")
    ] = None,
    checkpoint: choice_commands.Checkpoint = None,
    engine: Engine = None,
    engine_args: EngineArgs = "",
    state: State = None,
    as_json: Json = False,
) -> None:
    """Print what is stored: choices, verdicts with conditions, findings, environment."""
    with _one_sentence():
        from .autotune import discharge, stored, tables

        place = stored.place_of(state)
        if pictures is not None:
            from .autotune import reproduce as drawing

            drawing.pictures(stored.findings(place)[0], pictures)
        verdict = engine_commands.assessed(engine, engine_args, place)
        weights = None if checkpoint is None else discharge.find(checkpoint, place)
        if as_json:
            _print_json({**stored.as_json(place), "checkpoint": weights, "engine": verdict})
        else:
            tables.print_stored(place, findings)
            if weights is not None:
                typer.echo("\n".join(discharge.report(weights)))
            engine_commands.print_assessed([verdict])
        if verdict is not None:
            raise typer.Exit(engine_commands.exit_code([verdict]))


@app.command()
def reproduce(
    finding: Annotated[int, typer.Argument(help="A finding's number, from show --findings.")],
    gpu: Gpu = None,
    backend: Annotated[
        str | None, typer.Option(help="The backend, where it is a file: FILE.py:NAME.")
    ] = None,
    times: Annotated[int, typer.Option(help="How often to make the launch again.")] = 20,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Also write a script and data that run without fp4tune; folder or .zip."),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter to run the backend in, e.g. the engine's.")
    ] = None,
    hang_seconds: Annotated[
        float | None, typer.Option(help="Silence that counts as a hang; default 30; CPU 120.")
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Make a finding's launch again, and bundle it for the maintainer of the backend."""
    with _one_sentence():
        from .autotune import plan as planning
        from .autotune import reproduce as again
        from .autotune import stored
        from .probes import devices

        if times < 1:
            raise Refused(f"--times {times}: it must be at least 1")
        found = again.load(stored.place_of(state), finding)
        (target, *_) = devices.select(gpu)
        result = again.reproduce(
            found,
            target,
            again.spec_of(found, backend),
            times,
            planning.interpreter(python),
            planning.hang_seconds(hang_seconds),
            lambda who, text: None,
            bundle,
        )
        if as_json:
            _print_json(result.json())
        else:
            again.print_result(result)
        raise typer.Exit(result.exit_code)


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
    state: State = None,
    as_json: Json = False,
) -> None:
    """List every backend, what it supports on this device, and why not where it does not."""
    with _one_sentence():
        from .autotune import plan as planning
        from .autotune import support, tables
        from .probes import devices

        (target, *_) = devices.select(gpu)
        rows = support.rows(
            target,
            planning.backends(backend or ()),
            planning.interpreter(python),
            support.outcomes(target, state),
        )
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
    state: State = None,
    as_json: Json = False,
) -> None:
    """Judge compiled FP4 GEMM modules by their machine code; needs no GPU."""
    with _one_sentence():
        from .autotune import auditing as kept
        from .probes import audit as auditing
        from .probes.audit import text

        reports = auditing.audit(paths or (), text.arch(arch), text.progress())
        for remark in kept.remember(reports, state):
            typer.echo(f"fp4tune: {remark}", err=True)
        if as_json:
            _print_json([report.json() for report in reports])
        else:
            typer.echo("\n".join(text.lines(reports)))
        raise typer.Exit(text.exit_code(reports))


@app.command()
def selftest(
    gpu: Gpu = None,
    mutant: Annotated[
        list[str] | None,
        typer.Option(help="A mutant's name; repeatable. Default: all but those that need a soak."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Probe backends that fail on purpose: what does this prober catch here?"""
    with _one_sentence():
        from .autotune import selftest as testing
        from .autotune.watching import watching
        from .probes import devices

        chosen = [(t, testing.choose(t.device, mutant or ())) for t in devices.select(gpu)]
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


def _named(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise Refused(f"there is no {what} {name!r}; there are {', '.join(table)}")
    return table[name]


app.command()(choice_commands.explain)
app.command()(choice_commands.check_weights)
app.command()(report_commands.report)
app.command()(engine_commands.emit)
app.command()(daemon_commands.daemon)
app.command()(cache_commands.facts)
app.add_typer(engine_commands.quarantine, name="quarantine")
fleet_commands.register(app)


def main() -> None:
    """Entry point of the ``fp4tune`` command."""
    app(prog_name="fp4tune")


if __name__ == "__main__":
    main()
