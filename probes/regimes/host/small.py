"""The smallest problem that a backend takes: thousands of calls of it cost little."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from ...backends import Backend
from ...check.reference import Expectation, expect, faithful
from ...data import Operands, exact
from ...launch.case import Case
from ...launch.outcome import device_of
from ...problem import Device, Problem

_SHAPES = ((16, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256))
"""(n, k), the first that the backend takes and that holds an exact problem."""


def small_problem(
    backend: Backend, cases: Sequence[Case], case: Case, rows: int
) -> tuple[Problem, Operands, Expectation] | None:
    """An exact problem like the case's, of a shape that costs little and `rows` rows, and its
    answer within the bound that the case is judged by.

    On a CPU only, where nothing is compiled for a shape; None elsewhere, and where there is none.
    """
    if device_of(cases).type != "cpu":
        return None
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
