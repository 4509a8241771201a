"""A finding in a line."""

from __future__ import annotations

from ...cache.rows import Finding


def describe(finding: Finding) -> str:
    """The problem, and the worst element or what was raised.

    Raises KeyError, TypeError or ValueError for a finding that is stored in another way.
    """
    p, d = finding.problem, finding.detail
    text = f"m={p['m']} n={p['n']} k={p['k']}"
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
