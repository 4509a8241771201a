"""Which layers of a probe begin an MLP, and what else must be compiled to run it."""

from __future__ import annotations

from collections.abc import Sequence

from ..probes.problem import Problem
from ..probes.regimes.mlp.layers import second_shape

REGIME = "mlp-chain"
ELSEWHERE = "no MLP that begins with this layer is among those probed; another layer's was run"


def firsts(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """The layers that `mlp-chain` begins with.

    Those whose second GEMM is a layer of the probe, too, as gate-and-up and down are of a model;
    where none is, the first layer of each kind that can have a second GEMM at all.
    """
    found: list[Problem] = []
    problems = [p for p in problems if p.groups == 1]  # routed experts are a chain of their own
    for kind in dict.fromkeys(map(_chain_kind, problems)):
        mine = [p for p in problems if _chain_kind(p) == kind]
        able = [p for p in mine if second_shape(p) is not None]
        found += [p for p in able if _of_a_model(p, mine)] or able[:1]
    return tuple(found)


def seconds(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """Second GEMMs of `firsts` that are no layers of the probe: to be compiled beside those."""
    wanted = [second_shape(p) for p in firsts(problems)]
    return tuple(dict.fromkeys(p for p in wanted if p is not None and p not in problems))


def _of_a_model(first: Problem, layers: Sequence[Problem]) -> bool:
    """Whether `layers` hold the second GEMM, and it gives as many columns as the first takes."""
    second = second_shape(first)
    return second is not None and second.n == first.k and second in layers


def _chain_kind(p: Problem) -> tuple[object, ...]:
    return p.format, p.activation, p.out_dtype, p.groups, p.m
