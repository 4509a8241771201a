"""The command ``fp4tune probe``: run backends, check, time, store."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import NOT_ASSESSED, SAFE, UNSAFE, Refused
from . import _engine
from ._console import (
    ACTIVATIONS,
    Engine,
    EngineArgs,
    Formats,
    Gpu,
    Json,
    Level,
    OutDtype,
    Profile,
    State,
    Verbose,
    choice,
    given,
    named,
    one_sentence,
    print_json,
    program,
    refuse_beside,
    say,
    say_wrapped,
    status,
)

_LAYERS = ("preset", "model_config", "checkpoint", "shape")
_ASKS = (
    *_LAYERS, "experts", "gpu", "tp", "ep", "max_m", "formats", "activation", "out_dtype",
    "backend", "profile", "python", "prior", "engine", "traffic", "max_failure_rate",
)  # fmt: skip
"""Options that ask for a probe of something; without any, a CPU shows what a probe does."""


def probe(
    ctx: typer.Context,
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
    experts: Annotated[
        list[str] | None,
        typer.Option(
            help="One layer of routed experts as E,TOP_K,INTERMEDIATE,HIDDEN; repeatable."
        ),
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks the model is split over.")] = 1,
    ep: Annotated[
        int, typer.Option(help="Ranks that a model's routed experts are spread over.")
    ] = 1,
    max_m: Annotated[
        int | None, typer.Option(help="Largest m; default 4096 on a GPU, 32 on a CPU.")
    ] = None,
    formats: Formats = None,
    activation: Annotated[
        list[str] | None, choice(*ACTIVATIONS, help="bf16 (W4A16) or fp4 (W4A4); default both.")
    ] = None,
    out_dtype: OutDtype = "bf16",
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend name or FILE.py:NAME; repeatable. Default: all."),
    ] = None,
    level: Level = "standard",
    profile: Profile = None,
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
        typer.Option(help="Seconds of silence that count as a hang; default 30, on a CPU 120."),
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
    verbose: Verbose = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Run every backend here, check every element, time them, store the fastest safe one."""
    with one_sentence():
        _refuse_idle(ctx, engine, max_failure_rate, as_json)
        from ..machine import devices
        from ..probes.worker import nursery

        targets = devices.select(gpu)  # before what takes seconds to import
        shown = targets[0].device.kind == "cpu" and not given(ctx, *_ASKS)
        if shown:
            # Sums so small take longer on several threads, and their times are noise.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        nursery.warm(python)  # meanwhile
        from ..autotune import demonstration
        from ..autotune import forecast as forecasting
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
        from ..probes.models.experts import experts_on_rank, left_out, split_of_experts
        from ..probes.models.fusion import ENGINES
        from ..probes.problem import Problem
        from ..report.terminal import layers as layer_lines

        told: list[str] = []  # once all that was given is known to be good
        if shown:
            level = level if given(ctx, "level") else demonstration.LEVEL
            shape, max_m = [demonstration.SHAPE], demonstration.MAX_M
            backend, activation = [*demonstration.backends()], [demonstration.ACTIVATION]
            _refuse_to_demonstrate_in(directory(state))
            told += demonstration.before()
        chosen_level = named(LEVELS, level, "level")
        said = [name for name in (profile, engine) if name is not None]
        chosen_profile = named(PROFILES, said[0] if said else installed(), "profile")
        state_dir = directory(state)
        weighed = {chosen_profile.name: distributions.find(traffic)} if traffic else {}
        chosen_seed = planning.seed(seed)
        rate = planning.failure_rate(max_failure_rate, confidence)
        planning.budget(max_seconds, max_launches)
        held = routed_model = None
        if checkpoint is not None:
            rules = chosen_profile.name if chosen_profile.name in ENGINES else None
            held = shapes.checkpoint_layers(checkpoint, tp, rules)
            for sentence in layer_lines.about(held):
                say(f"fp4tune: {sentence}", err=True)
            split = split_of_experts(tp, ep)
            routed_model = (
                held if split == tp else shapes.checkpoint_layers(checkpoint, split, rules)
            )
        plans = []
        if not (preset or model_config or shape or experts or held):
            model = planning.DEFAULT_PRESET[targets[0].device.kind]
            told.append(f"no layer was named: these are those of {model} at --tp {tp}")
        for target in targets:
            most = planning.max_m(max_m, target)
            named_models = planning.models(preset or (), model_config, tp, held)
            whole = split_of_experts(tp, ep)
            with_experts = planning.models(preset or (), model_config, whole, routed_model)
            routed = planning.experts(experts or (), formats or (), with_experts, most, ep)
            if ep > 1 and not any(experts_on_rank(model, ep) for model in with_experts):
                raise Refused(
                    f"--ep {ep}: what is named has no routed experts in FP4 that can be spread "
                    f"over {ep} ranks, two on each"
                )
            for sentence in (each for model in with_experts for each in left_out(model, ep)):
                say(f"fp4tune: {sentence}", err=True)
            dense: tuple[Problem, ...] = ()
            if shape or named_models or not routed:
                layers = planning.layers(
                    preset or (), model_config, shape or (), tp, target.device.kind, held
                )
                if layers or not routed:
                    dense = planning.problems(
                        layers, formats or (), activation or (), out_dtype, most
                    )
            problems = (*dense, *routed)
            planning.fits(problems, target)
            wanted = tuple(backend or ())
            if prior and not backend:
                fleets = adopt.prior_backends(
                    state_dir,
                    (target.device.arch, target.name, chosen_profile.name),
                    [(p.format, p.activation, p.out_dtype, p.groups, p.n, p.k) for p in problems],
                )
                wanted = planning.prior(fleets, chosen_profile.name, target.device.sm, problems)
            plans.append(
                Plan(
                    target=target,
                    backends=planning.backends_for(wanted, problems),
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
        for sentence in told:
            say(sentence, err=True)
        from ..autotune.evidence.kept import with_what_is_kept
        from ..autotune.publication import published
        from ..autotune.publication.publish import publish
        from ..autotune.several_gpus import probe_all
        from ..cache import dropbox
        from ..cache.errors import Full
        from ..report import brief, documents
        from ..report.terminal.progress import watching_all
        from ..report.terminal.summary import print_probe

        # Refuses now what could not be published over at the end.
        stands = published.usable(state_dir)
        for sentence in dropbox.collect(state_dir, {c.backend for c in stands.candidates}):
            say(f"fp4tune: {sentence}", err=True)
        watched = None
        try:
            with Ledger.open(state_dir) as ledger:
                guesses = {plan.target.label: forecasting.forecast(plan, ledger) for plan in plans}
                with watching_all(plans, guesses) as watched:
                    reports, failed = probe_all(plans, ledger, state_dir, watched.progress)
            try:
                publish(reports, state_dir, weighed)
            except Full as full:
                raise with_what_is_kept(full, state_dir, [r.run for r in reports]) from None
        except KeyboardInterrupt:
            say(_interrupted(None if watched is None else watched.known()), err=True)
            raise typer.Exit(NOT_ASSESSED) from None
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
                if verbose:
                    print_probe(report)
                if report.candidates:
                    now = status(state_dir, report.target.name, chosen_profile.name)
                    then = _next_command(report, chosen_profile.name, python, state_dir, shown)
                    say_wrapped(brief.lines(report, now, then))
            _engine.print_assessed(verdicts)
        for label, error in failed.items():
            say(f"fp4tune: {label} could not be probed: {error}", err=True)
        statuses = {choice.status for report in reports for choice in report.choices}
        if not statuses:
            if any(report.left for report in reports):
                raise Refused(
                    f"the {budget:g} s of --budget were over before anything was proven, and "
                    "nothing is published: give it more, what was measured is kept"
                )
            why = [text for report in reports for text in report.broken.values()]
            more = f" (the first says: {why[0]})" if why else ""
            raise Refused(
                f"no backend could run any of these problems here{more}; nothing is published"
            )
        if failed or (backend and any(report.broken for report in reports)):
            raise typer.Exit(NOT_ASSESSED)
        if engine is not None:
            raise typer.Exit(_engine.exit_code(verdicts))
        raise typer.Exit(UNSAFE if "none" in statuses else SAFE)


def _refuse_idle(
    ctx: typer.Context,
    engine: str | None,
    max_failure_rate: float | None,
    as_json: bool,
) -> None:
    """Refuse options that would do nothing beside the others."""
    said = set(given(ctx, *_LAYERS, "experts"))
    if said and said <= {"--shape", "--experts"} and ctx.params["tp"] > 0:
        one = "--shape" if "--shape" in said else "--experts"
        refuse_beside(ctx, ["tp"], f"splits a model: {one} is a layer as it is on one rank already")
    if said == {"--experts"}:
        why = "is of dense layers, and --experts names none"
        refuse_beside(ctx, ["activation", "out_dtype"], why)
    if not given(ctx, "preset", "model_config", "checkpoint"):
        refuse_beside(ctx, ["ep"], "spreads a model's routed experts, and none is named")
    if engine is None:
        refuse_beside(
            ctx, ["engine_args"], "is what that engine is started with: name it, --engine"
        )
    if max_failure_rate is None:
        why = "limits what --max-failure-rate may spend, and no failure rate is to be bounded"
        refuse_beside(ctx, ["max_seconds"], why)
    if given(ctx, "backend"):
        refuse_beside(
            ctx, ["prior"], "probes the backends that the fleet chose: leave --backend out"
        )
    if as_json:
        refuse_beside(ctx, ["verbose"], "prints tables, and --json has all that is in them")


def _refuse_to_demonstrate_in(place: Path) -> None:
    """A demonstration takes the place of nothing that a GPU showed. Raises Refused."""
    scopes = status(place)["scopes"]
    gpus = sorted({scope["gpu"] for scope in scopes if scope["arch"] != "cpu"})
    if gpus:
        raise Refused(
            f"{place} holds what was published for {', '.join(gpus)}, and there is no GPU here: a "
            "demonstration keeps to a place of its own (--state)"
        )


def _interrupted(known: tuple[int, int] | None) -> str:
    """What to say of a probe that was ended: what is kept, and how to go on."""
    said = "interrupted: what was measured is kept; run the same command again"
    if known is None:
        return f"fp4tune: {said}"
    done, of = known
    return f"fp4tune: {said}: {done} of {of} layers known"


def _next_command(
    report: Any, profile: str, python: str | None, state_dir: Path, shown: bool
) -> str:
    """What to do next, as a command to copy."""
    from ..autotune import demonstration
    from ..cache import state as places
    from ..cache.experts import option_text
    from ..engines import installed, names

    me, recorded = program(), demonstration.recorded() if shown else None
    if recorded is not None:
        place = _near(recorded)
        return (
            f"see a run recorded on an H200: {me} show --state {place}, or its page: "
            f"{me} report --html h200.html --state {place}"
        )
    unnamed = [str(p) for p in places.default_places()]
    at = "" if str(state_dir) in unnamed else f" --state {_near(state_dir)}"
    bad = next((c for c in report.choices if c.status == "none"), None)
    if bad is not None:
        b = bad.bucket
        kind = "" if b.format == "nvfp4" else f" --format {b.format}"
        if experts := option_text(asdict(b)):
            return f"{me} explain {b.m_hi} --experts {experts}{kind}{at}"
        kind += "" if b.activation == "bf16" else f" --activation {b.activation}"
        return f"{me} explain {b.m_hi} {b.n} {b.k}{kind}{at}"
    if profile in names.ENGINES:
        there = installed.home(profile, python).source.there
        beside = f" --python {python}" if python else "" if there else " --python ITS_PYTHON"
        return f"{me} emit {profile}{beside}{at}"
    return f"{me} show{at}"


def _near(place: Path) -> str:
    """A path as one would type it from here."""
    near = os.path.relpath(place)
    return shlex.quote(str(place) if near.startswith("..") else near)
