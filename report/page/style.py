"""The colours of a page. Every pair of ink and paper here has a contrast of 4.5 or more."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f4f6f8",
    "ink": "#15191e",
    "soft": "#4d5763",
    "line": "#c9d1d9",
    "link": "#0b57b0",
    "safe": "#0f6b34",
    "unsafe": "#b3181f",
    "inconclusive": "#7a5200",
    "reference": "#4d5763",
    "tile": "#dfe5ea",
    "wrong": "#b3181f",
}
DARK = {
    "paper": "#12161b",
    "panel": "#1b2128",
    "ink": "#e8edf2",
    "soft": "#a9b4c0",
    "line": "#3a444f",
    "link": "#8ec2ff",
    "safe": "#6fd694",
    "unsafe": "#ff8d88",
    "inconclusive": "#f0c060",
    "reference": "#a9b4c0",
    "tile": "#323c47",
    "wrong": "#ff8d88",
}
# Backends, in the order they appear; told apart by a letter, too.
LIGHT_NAMES = (
    "#cfe3ff",
    "#ffe0b8",
    "#cdeed6",
    "#f6d0e6",
    "#e2d8fb",
    "#f5efb0",
    "#c8eef0",
    "#e6dcd2",
)
DARK_NAMES = (
    "#1d3f6e",
    "#6b4310",
    "#1c5431",
    "#6a2450",
    "#473489",
    "#57500f",
    "#12545a",
    "#55473a",
)
# The same backends as lines; these need a contrast of 3.
LIGHT_LINES = (
    "#1f5fbf",
    "#b35c00",
    "#1a7a3c",
    "#b0257a",
    "#6a4bc4",
    "#7d7400",
    "#0b7d86",
    "#7a5c3e",
)
DARK_LINES = (
    "#7fb4ff",
    "#ffb25c",
    "#6fd694",
    "#ff8fcb",
    "#b9a3ff",
    "#e0d64a",
    "#5fd6de",
    "#d6b694",
)
# Little to much, of one quantity.
LIGHT_STEPS = ("#f1f6fb", "#dceaf7", "#c3dcf1", "#a7cce9", "#88b9e0", "#68a5d6", "#5b9bd0")
DARK_STEPS = ("#1a2129", "#1b2d3f", "#1c3955", "#1d466c", "#1f5384", "#22609b", "#2a6cab")
LIGHT_BAD, DARK_BAD = "#fbd5d3", "#6e1f22"
STEPS = len(LIGHT_STEPS)
NAMES = len(LIGHT_NAMES)


def pairs() -> list[tuple[str, str]]:
    """Every (ink, paper) that text is set in."""
    found = []
    schemes = (
        (LIGHT, LIGHT_NAMES, LIGHT_STEPS, LIGHT_BAD),
        (DARK, DARK_NAMES, DARK_STEPS, DARK_BAD),
    )
    for scheme, names, steps, bad in schemes:
        found += [(scheme["ink"], paper) for paper in (*names, *steps, bad)]
        for ink in ("ink", "soft", "link", "safe", "unsafe", "inconclusive", "reference"):
            found += [(scheme[ink], scheme[paper]) for paper in ("paper", "panel")]
    return found


def lines() -> list[tuple[str, str]]:
    """Every (stroke, paper) of a chart."""
    return [(c, LIGHT["paper"]) for c in LIGHT_LINES] + [(c, DARK["paper"]) for c in DARK_LINES]


Variables = tuple[tuple[str, str], ...]


def variables(dark: bool) -> Variables:
    """The sheet's variables and their values in one of the schemes."""
    if dark:
        base, names, strokes, steps, bad = DARK, DARK_NAMES, DARK_LINES, DARK_STEPS, DARK_BAD
    else:
        base, names, strokes, steps, bad = LIGHT, LIGHT_NAMES, LIGHT_LINES, LIGHT_STEPS, LIGHT_BAD
    return (
        *base.items(),
        *((f"l{i}", colour) for i, colour in enumerate(strokes)),
        *((f"n{i}", colour) for i, colour in enumerate(names)),
        *((f"s{i}", colour) for i, colour in enumerate(steps)),
        ("bad", bad),
    )
