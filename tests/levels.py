"""Levels as tests of other things want them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
    return replace(launches_only(LEVELS["quick"].without), on_cpu=0.0)


def hurried() -> Level:
    """The same, with two seconds of launches at length."""
    return replace(brief(), on_cpu=2.0)


def program(level: str) -> str:
    """The source of ``fp4tune`` whose level quick is what the function of that name here says: for
    commands that run in a process of their own."""
    return f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import levels
from fp4tune.cli import main
levels.LEVELS["quick"] = levels.{level}()
main()
"""
