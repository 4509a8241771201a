"""Activations drawn anew in place between launches, with their answers: new problems for a chain
that stays as it was bound or captured.

Only work of the device is enqueued. The answer is a float32 product without tensor cores, of
operands dequantised by `formats`: exact on exact data, since no partial sum needs more than 24
bits. It is sampled against float64 in every draw. Those of routed experts are `RoutedAnswers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from ..check.reference import alpha_of, without_tensor_cores
from ..check.rounding import round_nearest
from ..data.exact import weight_rows
from ..data.generator import mix
from ..formats import dequantise
from ..problem import Fp4Tensor
from .case import Case, tensors

_COLUMNS = 8192
"""Columns of the output worked on at once."""
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 8, 64
"""Of each answer, so many are computed in float64 as well."""


class Answers(Protocol):
    """What makes the right answers to rows that were drawn anew."""

    def refresh(self, index: int, draw: int) -> torch.Tensor:
        """Put the answers to draw `draw` of case `index` in place; how many of those sampled are
        not those of float64, int64 (). Enqueues only."""


class Redraw:
    """Draws all rows of `cases` again, as often as called; `answers` makes what must come out."""

    def __init__(self, cases: Sequence[Case], answers: Answers) -> None:
        if not all(case.operands.rows for case in cases):
            raise ValueError("the rows of these cases cannot be drawn again")
        self._cases = cases
        self._answers = answers
        self._watchers: list[Callable[[], None]] = []
        self.draws = 0
        """How often everything was drawn again."""
        device = cases[0].operands.weight.codes.device
        self._missed = torch.zeros((), dtype=torch.int64, device=device)
        self.to(0)  # loads what it needs
        _wait(device)
        start = time.perf_counter()
        self.to(0)
        _wait(device)
        self.seconds = time.perf_counter() - start
        """What one draw takes."""

    def watch(self, mark: Callable[[], None]) -> None:
        """Call `mark` before each draw: it notes how many launches were of the one before."""
        self._watchers.append(mark)

    def forget(self) -> None:
        """Let go of all that came of the cases since, and of who watched."""
        self._watchers.clear()
        for case in self._cases:
            case.derived.clear()

    def __call__(self) -> None:
        """Draw again, on the current stream; what runs on others must have been waited for."""
        for mark in self._watchers:
            mark()
        self.draws += 1
        self.to(self.draws)

    def to(self, draw: int) -> None:
        """Put the rows and answers of a draw where those of another are."""
        self.draws = draw
        with without_tensor_cores():
            for index, case in enumerate(self._cases):
                assert case.operands.rows is not None
                given = tensors(case.operands.a)
                case.unchanged.look(given)
                case.operands.rows.fill(case.operands.a, draw)
                self._missed += self._answers.refresh(index, draw)
                case.unchanged.renew(given)
                for refresh in case.derived:
                    refresh()

    @property
    def missed(self) -> int:
        """How many sampled answers were not those of float64; waits for the device."""
        return int(self._missed)


class ProductAnswers:
    """The answers of dense cases: products of their rows and weights.

    `memory` is how many bytes of the device dequantised weights may be kept in; those beyond are
    dequantised again each time.
    """

    def __init__(self, cases: Sequence[Case], memory: int) -> None:
        self._cases = cases
        self._alphas = [alpha_of(case.operands) for case in cases]
        self._kept: dict[int, torch.Tensor] = {}
        for index, case in enumerate(cases):
            n, k = case.operands.weight.shape
            memory -= 2 * n * k
            if memory < 0:
                break
            # Six significant bits: exact in bf16.
            self._kept[index] = torch.cat(
                [part.bfloat16() for _, part in self._parts(index, case)], dim=0
            )

    def refresh(self, index: int, draw: int) -> torch.Tensor:
        """As `Answers` has it."""
        case = self._cases[index]
        a, lo = case.operands.a, case.expectation.lo
        left = dequantise(a, torch.float32, False) if isinstance(a, Fp4Tensor) else a.float()
        alpha = self._alphas[index]
        for cols, part in self._parts(index, case):
            # A power of two: the product stays exact, and is rounded once.
            lo[:, cols] = (left @ part.T).mul_(alpha)
        return self._sample(case, draw, lo, alpha)

    def _parts(self, index: int, case: Case) -> Iterator[tuple[slice, torch.Tensor]]:
        weight = case.operands.weight
        n = weight.shape[0]
        for first in range(0, n, _COLUMNS):
            cols = slice(first, min(n, first + _COLUMNS))
            if index in self._kept:
                yield cols, self._kept[index][cols].float()
            else:
                yield cols, dequantise(weight_rows(weight, cols), torch.float32, False)

    def _sample(self, case: Case, draw: int, lo: torch.Tensor, alpha: float) -> torch.Tensor:
        operands, (m, n) = case.operands, lo.shape
        device = lo.device
        if not m:
            return torch.zeros((), dtype=torch.int64, device=device)
        key = mix(operands.seed ^ mix(draw))
        rows = (torch.arange(_SAMPLED_ROWS, device=device) * mix(key + 1) + key) % m
        cols = (torch.arange(_SAMPLED_COLUMNS, device=device) * mix(key + 2) + key) % n
        a = operands.a
        if isinstance(a, Fp4Tensor):
            a = dequantise(weight_rows(a, rows), torch.float64, False)
        else:
            a = a[rows].double()
        b = dequantise(weight_rows(operands.weight, cols), torch.float64, False)
        right = round_nearest((a @ b.T).mul_(alpha), lo.dtype)
        return (lo[rows][:, cols] != right).sum()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
