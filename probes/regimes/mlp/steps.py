"""Binds the steps of an MLP chain to the memory that they pass on to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ...backends import Backend
from ...check.reference import right, tile_limit
from ...check.sweep import Slot, slot
from ...data import WIDTHS
from ...launch.case import (
    BackendRaised,
    Case,
    Launch,
    blame,
    own_quantiser,
    prepared_activation,
    quantise_and_run,
)
from ...problem import Fp4Tensor
from ..pdl.chain import Move, Step, arriving, duration_ns
from .judge import ByTiles
from .layers import Arena, Second, aligned, nbytes


@dataclass(frozen=True, slots=True)
class Layers:
    """One step: both GEMMs bound to the memory that is passed on, and the copies to be checked.

    y (m, n) and z (m, n2) are the results, hidden (m, n/2) what is between; `kept` are the copies
    of y and z. `before` and `between` are stored in front of the first and the second GEMM,
    which uses `tactic`.
    """

    launch: Launch
    tactic: str
    scale: float
    y: torch.Tensor
    hidden: torch.Tensor
    z: torch.Tensor
    kept: tuple[Slot, Slot | ByTiles]
    before: tuple[Move, ...]
    between: tuple[Move, ...]
    first: Step
    second: Step

    @property
    def last(self) -> Move:
        """The result of the step into its copy."""
        judged = self.kept[1]
        return self.z, (judged if isinstance(judged, Slot) else judged.slot).out


class Builder:
    """Binds launches, in order, to memory that they share."""

    def __init__(
        self,
        backend: Backend,
        cases: Sequence[Case],
        seconds: dict[int, Second],
        launches: Sequence[Launch],
        device: torch.device,
    ) -> None:
        self._backend = backend
        self._cases = cases
        self._seconds = seconds
        self._count = 0
        # W4A16 reads what SiLU stored; a backend's own quantiser reads it, too.
        self._stands_in = cases[0].problem.activation == "fp4" and not own_quantiser(backend)
        inputs, outputs, hidden, stored = [0], [0], [0], [0]
        for launch in launches:
            first, behind = cases[launch.case], seconds[launch.case].case
            inputs.append(nbytes(self._prepared(first, launch)))
            outputs.append(aligned(2 * launch.m * first.problem.n))
            hidden.append(aligned(2 * launch.m * behind.problem.k))
            if self._stands_in:
                stored.append(nbytes(self._prepared(behind, launch)))
        self._inputs, self._outputs, self._hidden, self._stored = (
            (Arena(max(sizes), device), Arena(max(sizes), device))
            for sizes in (inputs, outputs, hidden, stored)
        )

    def spoil(self) -> None:
        """Leave nothing of an earlier round in the memory that is passed on."""
        for pair in (self._inputs, self._outputs, self._hidden, self._stored):
            for arena in pair:
                arena.spoil()

    def _prepared(self, chosen: Case, launch: Launch) -> Any:
        return prepared_activation(self._backend, chosen.rows(launch.offset, launch.m))

    def layers(self, launch: Launch, tactics: Sequence[str]) -> Layers:
        """The next step; the second GEMM runs in peace, with the first of `tactics` that it can."""
        backend, first, behind = self._backend, self._cases[launch.case], self._seconds[launch.case]
        turn, pair = self._count % 2, self._count // 2 % 2
        self._count += 1
        m, n, dtype = launch.m, first.problem.n, first.problem.dtype
        outputs, hiddens = self._outputs[pair], self._hidden[turn]
        y = _view_of_arena(outputs, (m, n), dtype)
        z = _view_of_arena(outputs, (m, behind.case.problem.n), dtype)
        hidden = _view_of_arena(hiddens, (m, n // 2), dtype)

        self._inputs[turn].restart()
        a, before = arriving(self._prepared(first, launch), self._inputs[turn].like, first.derive)

        def run_first() -> None:
            with blame(backend):
                backend.run(first.state, a, y, launch.tactic)

        between: tuple[Move, ...] = ()
        state = behind.case.state
        rows = behind.case.rows(launch.offset, m)
        if isinstance(rows, Fp4Tensor) and not self._stands_in:
            global_scale = rows.global_scale

            def run(tactic: str, activation: Any, out: torch.Tensor) -> None:
                quantise_and_run(backend, state, activation, global_scale, out, tactic)

            given: Any = hidden

            calm: Any = behind.hidden[launch.offset : launch.offset + m]
        else:
            calm = prepared_activation(backend, rows)
            given = hidden
            if self._stands_in:
                self._stored[turn].restart()
                given, between = arriving(calm, self._stored[turn].like)

            def run(tactic: str, activation: Any, out: torch.Tensor) -> None:
                with blame(backend):
                    backend.run(state, activation, out, tactic)

        outs = [torch.empty_like(z) for _ in range(2)]
        tactic = _first_that_runs(tactics, lambda tactic: run(tactic, calm, outs[0]))
        run(tactic, calm, outs[1])

        def run_second() -> None:
            run(tactic, given, z)

        kept = self._judged(behind.case, launch, outs)
        place = first.slot(launch.offset, m)
        durations = [0, 0]
        if y.is_cuda:
            durations = [duration_ns(run_first), duration_ns(lambda: run(tactic, calm, outs[0]))]
        return Layers(
            launch,
            tactic,
            behind.scale,
            y,
            hidden,
            z,
            (place, kept),
            before,
            between,
            Step(run_first, duration_ns=durations[0]),
            Step(run_second, duration_ns=durations[1]),
        )

    def _judged(self, behind: Case, launch: Launch, calm: Sequence[torch.Tensor]) -> Slot | ByTiles:
        """How the second result is judged, by what two runs in peace gave."""
        limit = tile_limit(behind.problem.k)
        if isinstance(behind.operands.a, Fp4Tensor) and not self._stands_in:
            place = slot(calm[0], calm[0])
            if torch.equal(*calm):
                return place
            return ByTiles(place, calm[0].float(), limit)
        expected = behind.expectation.window(launch.offset, launch.offset + launch.m)
        place = slot(expected.lo, expected.hi)
        width = self._cases[launch.case].operands.width
        # A narrower accumulator may keep the bound now and miss it in another order of its sums.
        wide = width is None or width >= WIDTHS[0]
        if wide and all(bool(right(out, expected).all()) for out in calm):
            return place
        assert expected.ref is not None
        return ByTiles(place, expected.ref, limit)


def _first_that_runs(tactics: Sequence[str], run: Callable[[str], None]) -> str:
    for tactic in tactics[:-1]:
        with suppress(RuntimeError, BackendRaised):
            run(tactic)
            return tactic
    run(tactics[-1])
    return tactics[-1]


def _view_of_arena(arena: Arena, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    arena.restart()
    return arena.like(torch.empty(shape, dtype=dtype, device="meta"))
