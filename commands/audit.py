"""The command ``fp4tune audit``: static inspection of machine code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import NOT_ASSESSED, Refused
from ._console import (
    ENGINES,
    Json,
    State,
    choice,
    one_sentence,
    print_json,
    refuse_beside,
    say,
    say_lines,
)


def audit(
    ctx: typer.Context,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Libraries, objects, cubins, folders, installs. Default: this one."),
    ] = None,
    arch: Annotated[
        int | None, typer.Option(help="SM to audit for, e.g. 120. Default: the GPU here, else all.")
    ] = None,
    match: Annotated[
        str | None, typer.Option(help="Only modules whose name or path has this (a regex).")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Disassemblers at once. Default: as cores and memory allow."),
    ] = None,
    coverage: Annotated[
        bool,
        typer.Option(
            "--coverage", help="Say which SMs each kernel family has code for; judge nothing."
        ),
    ] = False,
    engine: Annotated[
        str | None,
        choice(*ENGINES, "flashinfer", help="With --coverage: its libraries, as installed here."),
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Judge compiled FP4 GEMM modules by their machine code; needs no GPU."""
    with one_sentence():
        try:
            if match is not None:
                re.compile(match)
        except re.error as error:
            raise Refused(f"--match {match!r} is no regular expression: {error}") from None
        if engine is not None and not coverage:
            raise Refused("--engine goes with --coverage")
        if coverage:
            refuse_beside(ctx, ["jobs"], "is for disassembling, which --coverage does not do")
            refuse_beside(ctx, ["state"], "is where verdicts go, and --coverage judges nothing")
        try:
            if coverage:
                code = _coverage([*(paths or ())], arch, engine, match, as_json)
            else:
                code = _print_verdicts([*(paths or ())], arch, match, jobs, state, as_json)
        except (Refused, ValueError, KeyboardInterrupt):
            raise
        except Exception as error:
            # Never with the code of a verdict.
            raise Refused(f"the audit failed: {type(error).__name__}: {error}") from error
        raise typer.Exit(code)


def _print_verdicts(
    paths: list[Path],
    arch: int | None,
    match: str | None,
    jobs: int | None,
    state: Path | None,
    as_json: bool,
) -> int:
    """Verdicts, each printed as soon as it is known; the exit code."""
    from ..engines import here
    from ..probes import audit as auditing
    from ..probes.audit import text

    sm = text.sm(arch, [] if arch else [name for name, _ in here.gpus()])
    options = auditing.AuditOptions(sm, text.progress(), match=match, jobs=jobs)
    reports = []
    for report in auditing.audits(paths, options):
        reports.append(report)
        if not as_json:
            say_lines(text.lines(report))
        elif sys.stderr.isatty():
            say(f"{report.verdict}  {report.module.name}", err=True)
    if match and not reports:
        raise Refused(f"no module here has {match!r} in its name or path")
    _remember(reports, state)
    if as_json:
        print_json([report.json() for report in reports])
    else:
        say(text.summary(reports))
    return text.exit_code(reports)


def _remember(reports: list, state: Path | None) -> None:
    from ..autotune.publication import audited as kept

    for remark in kept.remember(reports, state):
        say(f"fp4tune: {remark}", err=True)


def _coverage(
    paths: list[Path], arch: int | None, engine: str | None, match: str | None, as_json: bool
) -> int:
    """Which SMs the kernels of these libraries have code for; the exit code."""
    from ..probes.audit import coverage, text

    asked = text.sm(arch, [])
    sms = (asked,) if asked else coverage.DEFAULT_SMS
    found = coverage.of_paths(paths, engine, sms, match)
    if as_json:
        print_json(coverage.document(found, sms))
    else:
        say_lines(coverage.lines(found, sms))
    return 0 if found and not any(each.problem for each in found) else NOT_ASSESSED
