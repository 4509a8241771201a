"""Split-k on a GPU: right with memory of its own, wrong with what two calls share."""

from __future__ import annotations

from typing import Any

import torch

from ..problem import Device, Fp4Tensor, Problem
from .floor import Right

SPLITS = 4
_TURNS = 2
_TURN_NS = 20_000
_HALF = 32
"""Bytes of codes along k in one step: 64 elements."""
_BN = 64


def _rows_a_block(m: int) -> int:
    return 16 if m <= 16 else 64


class SplitK(Right):
    """Adds up its splits with atomics in fp32, in a workspace of each call: right in any order."""

    distributions = ("triton",)

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda":
            return "needs a GPU"
        if problem.format != "nvfp4":
            return "computes NVFP4 problems only"
        return super().unsupported(problem, device)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        sums = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        split_k(state.tensor, a, sums, out)


class SharedWorkspace(SplitK):
    """The same in one workspace of the layer."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        device = weight.codes.device
        sums = torch.empty(problem.m, problem.n, dtype=torch.float32, device=device)
        return super().prepare(weight, problem), sums

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight, sums = state
        assert out.shape[0] <= sums.shape[0], "more rows than the layer was prepared for"
        split_k(weight.tensor, a, sums[: out.shape[0]], out)


class WorkspaceByM(SplitK):
    """The same in workspaces of all layers, one for each m and n."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        key = tuple(out.shape)
        if key not in self.kept:
            self.kept[key] = torch.empty(key, dtype=torch.float32, device=out.device)
        split_k(state.tensor, a, self.kept[key], out)


class SharedLocks(SplitK):
    """Splits take turns by locks of the layer: two launches at once wait for each other."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        tiles = -(-(2 * problem.m + 1) // 16) * -(-problem.n // _BN)
        locks = torch.zeros(tiles, dtype=torch.int32, device=weight.codes.device)
        return super().prepare(weight, problem), locks

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        from . import _splitk_triton as kernels

        weight, locks = state
        (m, n), tensor = out.shape, weight.tensor
        if m == 0:
            return
        bm = _rows_a_block(m)
        sums = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        kernels.in_turn[(-(-m // bm) * -(-n // _BN), _TURNS)](
            a,
            tensor.codes,
            tensor.scales,
            tensor.global_scale,
            sums,
            locks,
            out,
            m,
            n,
            a.shape[1],
            a.stride(0),
            _TURN_NS,
            SPLITS=_TURNS,
            BM=bm,
            BN=_BN,
            HALF=_HALF,
        )


def split_k(weight: Fp4Tensor, a: torch.Tensor, sums: torch.Tensor, out: torch.Tensor) -> None:
    """Enqueue ``out = global_scale * a @ weight.T`` by way of `sums`, float32 (m, n)."""
    from . import _splitk_triton as kernels

    (m, n), size = out.shape, out.numel()
    if m == 0:
        return
    sums.zero_()
    bm = _rows_a_block(m)
    kernels.accumulate[(-(-m // bm), -(-n // _BN), SPLITS)](
        a,
        weight.codes,
        weight.scales,
        sums,
        m,
        n,
        a.shape[1],
        a.stride(0),
        SPLITS=SPLITS,
        BM=bm,
        BN=_BN,
        HALF=_HALF,
    )
    kernels.scale_down[(-(-size // 1024),)](sums, weight.global_scale, out, size, BLOCK=1024)
