"""Stages that read their input before the kernel before them has written it, one mutant a stage;
and one that waits as it should in all of them. Only a GPU with PDL shows it, and only an adversary
before the stage itself."""

from __future__ import annotations

import torch

from ...problem import Device
from ..floor import Prepared, TorchExperts
from ..problem import ExpertsProblem

_BLOCK = 1024
_PDL_SM = 90


class Copies(TorchExperts):
    """Copies the input of its stages with a kernel that is launched with PDL, and goes on with the
    copy."""

    name = "zoo-experts-right-waits"
    stages: tuple[str, ...] = ("permute", "gemm1", "activate", "gemm2", "finalize")
    waits = True

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if device.kind != "cuda" or (device.sm or 0) < _PDL_SM:
            return "it needs a GPU with programmatic dependent launch (SM90 or newer)"
        return None

    def taken(self, stage: str, given: torch.Tensor) -> torch.Tensor:
        """The input of a stage, copied where this is one of those."""
        if stage not in self.stages or not given.numel():
            return given
        from . import _hasty_triton as kernels

        source = given.contiguous()
        target = torch.empty_like(source)
        size = source.numel() * source.element_size() // 2
        kernels.copy[(-(-size // _BLOCK),)](
            source.view(torch.int16),
            target.view(torch.int16),
            size,
            WAIT=self.waits,
            BLOCK=_BLOCK,
            launch_pdl=True,
        )
        return target

    def permute(
        self, state: Prepared, ids: torch.Tensor, tactic: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().permute(state, self.taken("permute", ids), tactic)

    def gemm1(
        self, state: Prepared, x: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        return super().gemm1(state, self.taken("gemm1", x), ids, tactic)

    def activate(self, state: Prepared, h13: torch.Tensor, tactic: str) -> torch.Tensor:
        return super().activate(state, self.taken("activate", h13), tactic)

    def gemm2(
        self, state: Prepared, h: torch.Tensor, ids: torch.Tensor, tactic: str
    ) -> torch.Tensor:
        return super().gemm2(state, self.taken("gemm2", h), ids, tactic)

    def finalize(
        self,
        state: Prepared,
        y: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tactic: str,
    ) -> torch.Tensor:
        return super().finalize(state, self.taken("finalize", y), ids, weights, tactic)


class HastyPermute(Copies):
    """Sorts by experts that the router has not written yet."""

    name = "zoo-experts-hasty-permute"
    stages = ("permute",)
    waits = False


class HastyGemm1(Copies):
    """Multiplies tokens that are not there yet."""

    name = "zoo-experts-hasty-gemm1"
    stages = ("gemm1",)
    waits = False


class HastyActivation(Copies):
    """Takes gates and ups that gemm1 has not stored yet."""

    name = "zoo-experts-hasty-activation"
    stages = ("activate",)
    waits = False


class HastyGemm2(Copies):
    """Multiplies what the activation has not stored yet."""

    name = "zoo-experts-hasty-gemm2"
    stages = ("gemm2",)
    waits = False


class HastyFinalize(Copies):
    """Adds up what gemm2 has not stored yet: FlashInfer 3835."""

    name = "zoo-experts-hasty-finalize"
    stages = ("finalize",)
    waits = False


HASTY = (HastyPermute, HastyGemm1, HastyActivation, HastyGemm2, HastyFinalize)
"""They run on a GPU alone."""
