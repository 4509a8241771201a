"""What was found, and what was shown, in a sentence."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...cache.experts import layer_words
from ...cache.rows import Choice, Finding
from ...witness.foresee import foresee
from ...words import CHANCE, EVERY_M

FEW = 10
"""A bound that is no better than one launch in so many is not worth a number."""


def describe(finding: Finding) -> str:
    """The problem, and the worst element or what was raised.

    Raises KeyError, TypeError or ValueError for a finding that is stored in another way.
    """
    p, d = finding.problem, finding.detail
    text = f"m={p['m']} {layer_words(p)}"
    if "message" in d:
        return f"{text}: {d['message']}"
    if "worst" in d:
        worst = d["worst"]
        low, high = worst["expected"]
        expected = f"{low}" if low == high else f"{low} to {high}"
        where = f"[{worst['row']}, {worst['col']}]"
        text += f": {where} is {worst['found']}, expected {expected}"
    if d.get("tile_error") is not None:
        text += f": relative tile error {float(d['tile_error']):.2g}"
    if d.get("guard"):
        text += f": {d['guard']} elements written outside the output"
    return f"{text}; data seed {finding.seed}"


def told(finding: Finding) -> str:
    """`describe`, whatever is stored."""
    try:
        return describe(finding)
    except (KeyError, TypeError, ValueError, AttributeError):
        return "stored in a way that this version does not understand"


def shown(bounds: Mapping[str, Mapping[str, Any]], lo: int, hi: int) -> str:
    """What the launches of a kernel show of a bucket of m from `lo` to `hi`, as one sentence.

    `bounds` are by regime, as a choice keeps them. Counted is the weakest of the regimes in which a
    fault waits for chance: only there more launches show more.
    """
    waiting = {regime: known for regime, known in bounds.items() if regime in CHANCE}
    if not waiting:
        return "no regime in which a fault waits for chance was run"
    launches = min(int(known["launches"]) for known in waiting.values())
    problems = min(int(known["problems"]) for known in waiting.values())
    worst = max(waiting.values(), key=lambda known: known["upper"])
    said = f"{_count_and_noun(launches, 'launch')} over {_count_and_noun(problems, 'problem')}"
    if hi and (run := int(bounds.get(EVERY_M, {}).get("ms", 0))):
        said += _ms_in_words(run, lo, hi)
    where = ", ".join(sorted(waiting))
    said += f" in {where}" if len(waiting) == 1 else f" in each of {where}"
    one_in = int(1 / worst["upper"])
    if one_in < FEW:
        return f"{said}: too few to bound how often it may fail"
    confidence = f"{100 * worst['confidence']:g} %"
    return f"{said}: a fault in more than 1 of {one_in:,} would have shown ({confidence})"


def _ms_in_words(run: int, lo: int, hi: int) -> str:
    """Which m of a bucket were run, of which `run` were."""
    if hi == lo:
        return f" at m = {hi}"
    if run < hi - lo + 1:
        return f" and {run:,} of the {hi - lo + 1:,} m from {lo} to {hi}"
    return f" and every m from {lo} to {hi}"


def _count_and_noun(number: int, what: str) -> str:
    plural = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{plural}"


def witnessed(finding: Finding) -> str:
    """What the witness would have seen of it in production, in words; empty where nothing can be
    said."""
    p = finding.problem
    try:
        shape = (int(p["m"]), int(p["n"]), int(p["k"]))
        return foresee(finding.kind, finding.detail, shape, str(p["out_dtype"])).said
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return ""


def assurance(choices: Sequence[Choice]) -> str:
    """What the launches behind the least sure of these choices show, in a sentence; empty where
    nothing was chosen."""
    known = {}
    for number, choice in enumerate(choices):
        waiting = [b["upper"] for regime, b in choice.bounds.items() if regime in CHANCE]
        if choice.status != "none" and waiting:
            known[number] = max(waiting)
    if not known:
        return ""
    weakest = choices[max(known, key=lambda number: known[number])]
    b = weakest.bucket
    return f"least sure of the choices, {weakest.backend}: {shown(weakest.bounds, b.m_lo, b.m_hi)}"


def known_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much of a probe was known, in a line; empty where nothing was."""
    said = [text for text in (_layers_known(rows), _steps_taken_up(rows)) if text]
    return "; ".join(said)


def _layers_known(rows: Sequence[Mapping[str, Any]]) -> str:
    if not any(row["known"] for row in rows):
        return ""
    whole = [row for row in rows if not row["measured"] and row["times"] is not None]
    sources = {known["run"]: known["at"] for row in rows for known in row["known"]}
    days = {run: time.strftime("%Y-%m-%d", time.gmtime(at or 0)) for run, at in sources.items()}
    named = [f"{run} ({day})" for run, day in days.items()]
    origin = f"run {named[0]}" if len(named) == 1 else f"runs {', '.join(named[:3])}"
    if len(named) > 3:
        origin += f" and {len(named) - 3} more"
    text = f"{len(whole)} of {len(rows)} layers known from {origin}, "
    text += f"measured {len(rows) - len(whole)}"
    partly = sum(len(row["known"]) for row in rows if row not in whole)
    if partly:
        text += f" (where {partly} backends were known and timed only)"
    return text


def _steps_taken_up(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = [part for row in rows for part in row["resumed"]]
    if not parts:
        return ""
    runs = list(dict.fromkeys(run for part in parts for run in part["runs"]))
    origin = f"run {runs[0]}" if len(runs) == 1 else f"{len(runs)} runs"
    count = sum(part["steps"] for part in parts)
    return f"went on after {count} steps that {origin} had finished of {_many(rows)}"


def _many(rows: Sequence[Mapping[str, Any]]) -> str:
    count = sum(bool(row["resumed"]) for row in rows)
    return "a layer" if count == 1 else f"{count} layers"
