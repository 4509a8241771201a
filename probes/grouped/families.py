"""The data of a grouped problem that are graded apart: realistic values, and odd routing, each kind
of which has a condition."""

from __future__ import annotations

from typing import NamedTuple

from ...words import Condition
from ..data import FAMILIES
from ..data.families import Family
from ..problem import Problem
from .problem import ExpertsProblem
from .realistic import families_of


class OddRouting(NamedTuple):
    """A routing law that engines may or may not make: where a backend fails on it alone, it is safe
    for those that do not."""

    name: str
    condition: Condition
    bounded_by: str | None = "exact"


_FEWEST_FOR_TWICE = 2
TOP_K = {"top-1": 1, "top-8": 8}
"""Families in which tokens have another number of experts than the layer's, by its name."""


def grouped_families(problem: Problem) -> tuple[Family | OddRouting, ...]:
    """What there is for a problem: of a dense one nothing; with one expert a token none can be
    there twice, and no token has more than there are."""
    if not isinstance(problem, ExpertsProblem):
        return ()
    without = set()
    if problem.top_k < _FEWEST_FOR_TWICE:
        without.add("duplicates")
    without |= {name for name, k in TOP_K.items() if k == problem.top_k or k > problem.groups}
    odd = tuple(f for f in ODD_ROUTING.values() if f.name not in without)
    return (*(FAMILIES[name] for name in families_of(problem)), *odd)


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
        *(
            OddRouting(
                name,
                Condition("own-top-k", "tokens have as many experts as the configuration says"),
            )
            for name in TOP_K
        ),
        OddRouting(
            "nan-router",
            Condition("finite-router", "the router's weights are finite, of padding rows too"),
        ),
    )
}
