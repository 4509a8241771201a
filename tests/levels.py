"""Levels as tests of other things want them."""

from __future__ import annotations

from dataclasses import replace

from fp4tune.autotune.levels import LEVELS, Level

HOST = (
    "returned",
    "own-quantiser",
    "addresses",
    "weights",
    "effects",
    "callers",
    "first-calls",
    "scratch",
    "history",
)
"""Regimes of what a backend does on the host, which have tests of their own."""


def launches_only(without: tuple[str, ...] = ()) -> Level:
    """``quick`` with every regime of how launches are made, but for those in `without`."""
    return replace(LEVELS["quick"], without=(*without, *HOST))


def brief() -> Level:
    """What ``quick`` does, without the regimes of the host: for tests in which verdicts are made,
    and not doubted."""
    return launches_only(LEVELS["quick"].without)
