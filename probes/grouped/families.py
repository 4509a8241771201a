"""The data of a grouped problem that are graded apart: odd routing, each with its condition."""

from __future__ import annotations

from typing import NamedTuple

from ...words import Condition
from ..problem import Problem
from .problem import ExpertsProblem


class OddRouting(NamedTuple):
    """A routing law that engines may or may not make: where a backend fails on it alone, it is safe
    for those that do not."""

    name: str
    condition: Condition
    bounded_by: str | None = "exact"


_FEWEST_FOR_TWICE = 2


def odd_routing(problem: Problem) -> tuple[OddRouting, ...]:
    """The odd laws that exist for a problem: of a dense one none, and with one expert a token none
    can be there twice."""
    if not isinstance(problem, ExpertsProblem):
        return ()
    twice = problem.top_k >= _FEWEST_FOR_TWICE
    return tuple(f for f in ODD_ROUTING.values() if twice or f.name != "duplicates")


ODD_ROUTING = {
    family.name: family
    for family in (
        OddRouting(
            "duplicates",
            Condition("different-experts", "a token's experts are different ones"),
        ),
        OddRouting(
            "elsewhere",
            Condition("all-experts-here", "no expert is on another rank (no -1 among the experts)"),
        ),
        OddRouting(
            "foreign-ids",
            Condition(
                "elsewhere-is-minus-one",
                "experts on other ranks are numbered -1, and not otherwise",
            ),
        ),
        OddRouting(
            "padding-ids",
            Condition("padding-names-experts", "padding rows name experts that there are"),
        ),
        OddRouting(
            "nan-router",
            Condition("finite-router", "the router's weights are finite, of padding rows too"),
        ),
    )
}
