"""Launches the kernels between the GEMMs of an MLP chain on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..pdl.chain import BLOCK, DelayClock, Move, Moves, Step
from .layers import SiluAndMultiply

_SILU_BLOCK = 1024


class LateKernels:
    """Kernels in front of the steps of a chain: they trigger, wait as they should, and are late."""

    def __init__(self, clock: DelayClock, device: torch.device, pdl: bool) -> None:
        self._clock = clock
        self._device = device
        self._options: dict[str, Any] = {"PDL": pdl, "num_warps": 8}
        if pdl:
            self._options["launch_pdl"] = True

    def produce(self, index: int, moves: Sequence[Move]) -> Callable[[], None]:
        """A launch that makes `moves`, in front of step `index` of the chain."""
        from . import _mlp_triton as kernels

        table = Moves([moves], self._device)

        def strike() -> None:
            kernels.produce[(self._clock.programs,)](
                *self._clock.at(index), *table.of(0), BLOCK=BLOCK, **self._options
            )

        return strike

    def silu(
        self,
        index: int,
        y: torch.Tensor,
        copy: torch.Tensor,
        hidden: torch.Tensor,
        scale: float,
        moves: Sequence[Move] = (),
    ) -> Callable[[], None]:
        """A launch of SiLU-and-multiply in front of step `index`; it keeps a copy of y (m, n)."""
        from . import _mlp_triton as kernels

        table = Moves([moves], self._device)

        def strike() -> None:
            kernels.silu_and_multiply[(self._clock.programs,)](
                *self._clock.at(index),
                *table.of(0),
                y,
                copy,
                hidden,
                hidden.numel(),
                hidden.shape[1],
                scale,
                BLOCK=_SILU_BLOCK,
                **self._options,
            )

        return strike


def silu_with(device: torch.device, pdl: bool) -> SiluAndMultiply:
    """The chain's own SiLU-and-multiply, by itself and without a delay: the same bits."""
    clock = DelayClock([Step(lambda: None)], device, late=False)
    kernels = LateKernels(clock, device, pdl)

    def silu(y: torch.Tensor, scale: float, hidden: torch.Tensor) -> None:
        kernels.silu(0, y, torch.empty_like(y), hidden, scale)()

    return silu
