"""The smallest problem that a backend takes: thousands of calls of it cost little."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

from ...backends import Backend
from ...check.reference import Expectation, expect, faithful
from ...data import exact
from ...grouped.backend import AsDense
from ...launch.case import Case
from ...launch.outcome import device_of
from ...launch.routed_cases import balanced_case
from ...problem import Device, Problem

_SHAPES = ((16, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256))
"""(n, k), the first that the backend takes and that holds an exact problem."""
_EXPERTS = (2, 4, 8)
"""Experts of such a layer, as few as have the layer's top-k among them."""


def small_problem(
    backend: Backend, cases: Sequence[Case], case: Case, rows: int
) -> tuple[Problem, Any, Expectation] | None:
    """An exact problem like the case's, of a shape that costs little and `rows` rows, and its
    answer within the bound that the case is judged by.

    On a CPU only, where nothing is compiled for a shape; None elsewhere, and where there is none.
    """
    if device_of(cases).type != "cpu":
        return None
    if isinstance(backend, AsDense):
        return _small_experts(backend, case, rows)
    for n, k in _SHAPES:
        problem = replace(case.problem, m=rows, n=n, k=k)
        if backend.unsupported(problem, Device("cpu")) is not None:
            continue
        with suppress(ValueError):
            width, seed = case.operands.width or 8, case.operands.seed
            operands = exact(problem, width, seed, "cpu")
            answer = expect if case.expectation.exact else faithful
            return problem, operands, answer(operands, problem)
    return None


def _small_experts(
    backend: AsDense, case: Case, rows: int
) -> tuple[Problem, Any, Expectation] | None:
    assert backend.problem is not None
    for groups, (n, k) in product(_EXPERTS, _SHAPES[1:]):
        if groups < backend.problem.top_k:
            continue
        problem = replace(backend.problem, groups=groups, m=rows, n=n, k=k)
        if backend.unsupported(problem, Device("cpu")) is None:
            made = balanced_case(backend, problem, case.operands.seed, "cpu")
            return problem, made.operands, made.expectation
    return None
