"""What the state directory says, for people and programs: one problem, or everything."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cache import reader, state
from ..cache.errors import Missing, StateError
from ..cache.ledger import Ledger
from ..cache.rows import Finding, Run
from ..probes.problem import Problem
from . import standing
from .probe import Report
from .stats import failure_bound


def place_of(state_dir: Path | None) -> Path:
    """Where to read: the directory given, else the first place that holds a choices.db.

    Raises Missing where there is none.
    """
    if state_dir is not None:
        return state_dir
    holding = state.holding()
    if not holding:
        raise Missing(state.directory(), "nothing is stored yet; run fp4tune probe")
    return holding[0]


def decision(
    state_dir: Path | None,
    m: int,
    n: int,
    k: int,
    format_: str,
    activation: str,
    out_dtype: str,
    profile: str | None = None,
) -> dict[str, Any]:
    """What the engine's reader answers for one problem, and the bound behind it.

    Raises ValueError for a problem that cannot be, which the reader itself takes for unknown.
    """
    asked = asdict(Problem(format_, m, n, k, activation, out_dtype))
    place = place_of(state_dir)
    found = reader.open(place, profile=profile).choose(m, n, k, format_, activation, out_dtype)
    answer = {name: getattr(found, name) for name in found.__slots__}
    answer["failure_bound_95"] = failure_bound(found.problems)
    answer["problem"] = asked
    return answer


def decision_line(answer: dict[str, Any]) -> str:
    """One problem's answer in one or two lines."""
    p = answer["problem"]
    problem = f"m={p['m']} n={p['n']} k={p['k']} {p['format']}"
    if answer["status"] != "safe":
        return f"{problem}: {answer['backend']} ({answer['status']}: {answer['reason']})"
    line = f"{problem}: {answer['backend']}"
    if answer["tactic"] != "default":
        line += f" {answer['tactic']}"
    time = "" if answer["median_us"] is None else f"{answer['median_us']:.1f} us, "
    bound = f"failure rate below {answer['failure_bound_95']:.1g} (95 %) in each regime"
    line += (
        f" (safe; {time}at least {answer['launches']} launches of {answer['problems']} problems "
        f"in each regime: {bound})"
    )
    for regime, known in answer["bounds"].items():
        line += (
            f"\n  {regime}: failure rate below {known['upper']:.2g} "
            f"({100 * known['confidence']:g} %; {known['problems']} problems, "
            f"{known['launches']} launches of its kernel)"
        )
    for condition in answer["conditions"]:
        line += f"\n  if {condition['text']}"
    return line


def findings(place: Path) -> tuple[list[Finding], list[Run]]:
    """Findings of the environments that are current, and all runs; none without a ledger."""
    try:
        with Ledger.open(place, readonly=True) as ledger:
            current = {c.fingerprint for c in standing.load(place).candidates if c.fingerprint}
            return ledger.findings(fingerprints=sorted(current)), ledger.runs()
    except StateError:
        return [], []


def as_json(place: Path) -> dict[str, Any]:
    """Everything that is stored and holds, as one JSON document."""
    stored = standing.load(place)
    found, runs = findings(place)
    return {
        "generation": stored.generation,
        "meta": stored.meta,
        "choices": [asdict(row) for row in stored.choices],
        "candidates": [asdict(row) for row in stored.candidates],
        "environments": [_plain(asdict(row)) for row in stored.environments],
        "findings": [_plain(asdict(row)) for row in found],
        "runs": [_plain(asdict(row)) for row in runs],
    }


def report_json(report: Report) -> dict[str, Any]:
    """One finished probe as a JSON document."""
    return {
        "run": report.run,
        "seed": report.seed,
        "device": {
            "name": report.target.name,
            "arch": report.target.device.arch,
            "uuid": report.target.uuid,
        },
        "generation": report.generation,
        "choices": [asdict(row) for row in report.choices],
        "layers": [each.json() for each in report.layers],
        "candidates": [asdict(row) for row in report.candidates],
        "findings": [_plain(asdict(row)) for row in report.findings],
        "timings": [_plain(asdict(row)) for row in report.timings],
        "audits": [asdict(row) for row in report.audits],
        "unsupported": report.unsupported,
        "broken": report.broken,
        "build_seconds": report.build_seconds,
        "build_wall_seconds": report.build_wall_seconds,
        "seconds": report.seconds,
        "spent": report.spent,
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Mappings that are not dicts are what `json` does not take."""
    return {
        key: dict(value) if hasattr(value, "keys") and not isinstance(value, dict) else value
        for key, value in row.items()
    }
