"""The command ``fp4tune probe``: run backends, check, time, store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import NOT_ASSESSED, SAFE, UNSAFE, Refused
from . import _engine
from ._console import (
    Engine,
    EngineArgs,
    Formats,
    Gpu,
    Json,
    OutDtype,
    State,
    named,
    one_sentence,
    print_json,
    say,
)


def probe(
    gpu: Gpu = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="Shapes of a known model; repeatable.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="Shapes from a Hugging Face config.json.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="The FP4 layers of a checkpoint: a folder, or a name in the local cache."
        ),
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
        typer.Option(help="Launch what is chosen until its regimes bound the rate so."),
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
    with one_sentence():
        from ..machine import devices
        from ..probes.worker import nursery

        targets = devices.select(gpu)  # before what takes seconds to import
        nursery.warm(python)  # meanwhile
        from ..autotune import request as planning
        from ..autotune.choice import traffic as distributions
        from ..autotune.levels import LEVELS
        from ..autotune.plan import Plan
        from ..autotune.verdict.profiles import PROFILES, installed
        from ..cache.ledger import Ledger
        from ..cache.state import directory
        from ..fleet import adopt
        from ..probes import quantisers
        from ..probes.models import shapes
        from ..probes.models.fusion import ENGINES
        from ..report.terminal import layers as layer_lines

        chosen_level = named(LEVELS, level, "level")
        chosen_profile = named(PROFILES, profile or engine or installed(), "profile")
        state_dir = directory(state)
        weighed = {chosen_profile.name: distributions.find(traffic)} if traffic else {}
        chosen_seed = planning.seed(seed)
        rate = planning.failure_rate(max_failure_rate, confidence)
        planning.budget(max_seconds, max_launches)
        held = None
        if checkpoint is not None:
            rules = chosen_profile.name if chosen_profile.name in ENGINES else None
            held = shapes.checkpoint_layers(checkpoint, tp, rules)
            for sentence in layer_lines.about(held):
                say(f"fp4tune: {sentence}", err=True)
        plans = []
        for target in targets:
            layers = planning.layers(
                preset or (), model_config, shape or (), tp, target.device.kind, held
            )
            problems = planning.problems(
                layers,
                formats or (),
                activation or (),
                out_dtype,
                planning.max_m(max_m, target),
            )
            planning.fits(problems, target)
            wanted = tuple(backend or ())
            if prior and not backend:
                fleets = adopt.prior_backends(
                    state_dir,
                    (target.device.arch, target.name, chosen_profile.name),
                    [(p.format, p.activation, p.out_dtype, p.n, p.k) for p in problems],
                )
                wanted = planning.prior(fleets, chosen_profile.name, target.device.sm)
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
        from ..autotune.evidence.kept import with_what_is_kept
        from ..autotune.publication import published
        from ..autotune.publication.publish import publish
        from ..autotune.several_gpus import probe_all
        from ..cache import dropbox
        from ..cache.errors import Full
        from ..report import documents
        from ..report.terminal.progress import watching_all
        from ..report.terminal.summary import print_probe

        # Refuses now what could not be published over at the end.
        stands = published.usable(state_dir)
        for sentence in dropbox.collect(state_dir, {c.backend for c in stands.candidates}):
            say(f"fp4tune: {sentence}", err=True)
        with Ledger.open(state_dir) as ledger, watching_all(plans) as progress:
            reports, failed = probe_all(plans, ledger, state_dir, progress)
        try:
            publish(reports, state_dir, weighed)
        except Full as full:
            raise with_what_is_kept(full, state_dir, [r.run for r in reports]) from None
        verdicts = [
            _engine.assessed(
                engine,
                engine_args,
                state_dir,
                arch=r.target.device.arch,
                gpu=r.target.name,
                python=python,
            )
            for r in reports
            if r.candidates
        ]
        made = [environment for r in reports for environment in r.environments]
        _engine.warn_of_other_versions(chosen_profile.name, python, made)
        if as_json:
            print_json(
                [{**documents.probe_json(r), "engine": engine and verdicts} for r in reports]
            )
        else:
            for report in reports:
                print_probe(report)
            _engine.print_assessed(verdicts)
        for label, error in failed.items():
            say(f"fp4tune: {label} could not be probed: {error}", err=True)
        statuses = {choice.status for report in reports for choice in report.choices}
        if not statuses:
            raise Refused("no backend could run any of these problems here; nothing is published")
        if failed:
            raise typer.Exit(NOT_ASSESSED)
        if engine is not None:
            raise typer.Exit(_engine.exit_code(verdicts))
        raise typer.Exit(UNSAFE if "none" in statuses else SAFE)
