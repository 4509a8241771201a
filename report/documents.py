"""What the state directory says, for people and programs: one problem, or everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..autotune import checkpoint_check
from ..autotune.choice import layouts
from ..autotune.plan import Report
from ..autotune.publication import published as standing
from ..autotune.verdict.statistics import failure_bound
from ..cache import reader, state
from ..cache.errors import StateError
from ..cache.ledger import Ledger
from ..cache.rows import Candidate, Finding, Run
from ..probes.problem import Problem


def place_of(state_dir: Path | None) -> Path:
    """Where to read: the directory given, else the first place that holds a choices.db.

    Raises Missing where there is none.
    """
    if state_dir is not None:
        return state_dir
    holding = state.holding()
    if not holding:
        raise state.nothing_published()
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


def compared(published: standing.Standing) -> list[layouts.Comparison]:
    """The weight layouts of every layer, as published."""
    groups: dict[layouts.Key, list[Candidate]] = {}
    for candidate in published.candidates:
        groups.setdefault(layouts.key_of(candidate), []).append(candidate)
    return [layer_of(published, group) for group in groups.values()]


def layer_of(published: standing.Standing, candidates: Sequence[Candidate]) -> layouts.Comparison:
    """The layouts of one layer, of which these are all candidates, with the one published."""
    traffics = layouts.traffics_of(published.meta)
    timed = layouts.quantisers_of(published.meta)
    (found,) = layouts.compare_all(candidates, traffics, published.layers, timed)
    rows = {layouts.key_of_row(row): row.layout for row in published.layers}
    if found.layout == rows.get(found.key):
        return found
    return replace(
        found,
        layout=rows.get(found.key),
        layer_us=None,
        reason="this is not what was published; the next fp4tune probe chooses anew",
    )


def layer(
    state_dir: Path | None,
    n: int,
    k: int,
    format_: str,
    activation: str,
    out_dtype: str,
    profile: str | None = None,
) -> dict[str, Any] | None:
    """One layer's layouts as a document, None where it was not probed; with ``crossing``, whether
    the other activation would be faster."""
    place = place_of(state_dir)
    scope = reader.open(place, profile=profile).scope()
    if scope is None:
        return None
    found = {each.key: each for each in compared(standing.load(place))}
    mine = found.get((*scope, format_, activation, out_dtype, 1, n, k))
    if mine is None:
        return None
    crossed = layouts.crossings(found.values())
    crossing = crossed.get((*scope, format_, "bf16", out_dtype, 1, n, k))
    return {**mine.json(), "crossing": asdict(crossing) if crossing else None}


def for_checkpoint(
    state_dir: Path | None,
    checkpoint: Path,
    answer: Mapping[str, Any],
    profile: str | None = None,
) -> dict[str, Any]:
    """A `decision` held against a checkpoint's weights, as `discharge.assess` has it; where they
    break its conditions, ``instead`` is the next candidate whose conditions they do not break.

    Raises Refused where the checkpoint was not checked.
    """
    place = place_of(state_dir)
    record = checkpoint_check.find(checkpoint, place)
    p = answer["problem"]
    assessed = checkpoint_check.assess(record, answer["conditions"], p["format"], p["out_dtype"])
    instead = None
    if assessed["status"] == "broken":
        question = (p["m"], p["n"], p["k"], p["format"], p["activation"], p["out_dtype"])
        for other in reader.open(place, profile=profile).alternatives(*question):
            its = checkpoint_check.assess(record, other.conditions, p["format"], p["out_dtype"])
            if other.status == "safe" and its["status"] == "holds":
                names = ("backend", "tactic", "layout", "median_us")
                instead = {name: getattr(other, name) for name in names}
                break
    return {**assessed, "instead": instead}


def choice_lines(answer: Mapping[str, Any], layer: bool) -> list[str]:
    """What a `decision` says beyond its line: of its layer, and of a checkpoint."""
    out = []
    if answer["layer"]:
        out += layer_lines(answer["layer"])
    elif layer:
        out.append("no weight layout is known for this layer: it was not probed")
    weights = answer["checkpoint"]
    if weights:
        out += checkpoint_check.lines(weights)
        if weights["instead"]:
            out.append(f"for this checkpoint: {weights['instead']['backend']} instead")
        elif weights["status"] == "broken":
            out.append("for this checkpoint nothing is proven here")
    return out


def layer_lines(document: Mapping[str, Any]) -> list[str]:
    """A layer's layouts in words."""
    d = document
    weights = "W4A4" if d["activation"] == "fp4" else "W4A16"
    head = f"n={d['n']} k={d['k']} {d['format']} {weights}: "
    if d["layout"]:
        head += f"weights are laid out as {d['layout']}, weighed by the traffic {d['traffic']}"
    else:
        head += "no weight layout is chosen"
    out = [head + (f"; {d['reason']}" if d["reason"] else "")]
    if d["layout"] and d["covered"] < 0.995:
        out.append(
            f"  {100 * d['covered']:.0f} % of that traffic was probed; the rest counts for nothing"
        )
    for fit in d["fits"]:
        if fit["expected_us"] is not None:
            interval = f"{fit['lo_us']:.1f} to {fit['hi_us']:.1f}"
            names = ", ".join(dict.fromkeys(part["backend"] for part in fit["parts"]))
            out.append(
                f"  {fit['layout']}: {fit['expected_us']:.1f} us a call ({interval}; {names})"
            )
        elif fit["holes"]:
            lo, hi = fit["holes"][0]
            more = f" and {len(fit['holes']) - 1} more" if len(fit["holes"]) > 1 else ""
            first = lo if lo == hi else f"{lo} to {hi}"
            out.append(f"  {fit['layout']}: nothing safe at m={first}{more}")
    if d["activation"] == "fp4" and d["layout"] and d["layer_us"] is None:
        out.append(f"  {layouts.NO_QUANTISER}: these are times of the GEMM alone")
    elif d["activation"] == "fp4" and d["layout"]:
        out.append(f"  with its activation quantiser: {d['layer_us']:.1f} us a call")
    if d.get("crossing"):
        out.append(f"  W4A16 against W4A4: {d['crossing']['reason']}")
    return out


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
        "layers": [each.json() for each in compared(stored)],
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
        "known": report.known,
        "unsupported": report.unsupported,
        "broken": report.broken,
        "build_seconds": report.build_seconds,
        "build_wall_seconds": report.build_wall_seconds,
        "seconds": report.seconds,
        "left": report.left,
        "spent": report.spent,
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Mappings that are not dicts are what `json` does not take."""
    return {
        key: dict(value) if hasattr(value, "keys") and not isinstance(value, dict) else value
        for key, value in row.items()
    }
