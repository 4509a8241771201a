"""Mutants of what is around a kernel: memory, streams, plans, the host's time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from ..problem import Device, Fp4Tensor, Problem
from .floor import Right, decoded

LEAK = 1 << 20
"""Bytes that a leak leaves behind each time."""
PLAN_SECONDS = 0.02


class OnGpu(Right):
    """Right, and on a GPU only: what it does has no meaning elsewhere."""

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return super().unsupported(problem, device) if device.kind == "cuda" else "needs a GPU"


class LeaksOnTheHost(Right):
    """Keeps a record of every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: list[bytearray] = []

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        self.kept.append(bytearray(LEAK // 4))
        super().run(state, a, out, tactic)


class LeaksOnTheDevice(OnGpu):
    """Keeps a workspace of every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: list[torch.Tensor] = []

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        self.kept.append(torch.empty(LEAK // 2, dtype=torch.uint8, device=out.device))
        super().run(state, a, out, tactic)


class PlansEveryM(Right):
    """Makes a plan for each m it has not seen, and keeps it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.plans: dict[int, torch.Tensor] = {}

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        m = a.shape[0]
        if m not in self.plans:
            end = time.perf_counter() + PLAN_SECONDS
            while time.perf_counter() < end:
                pass
            self.plans[m] = torch.zeros(LEAK, dtype=torch.uint8, device=out.device)
        super().run(state, a, out, tactic)


class WaitsForTheGpu(OnGpu):
    """Synchronises with the GPU before it returns."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a, out, tactic)
        torch.cuda.current_stream(out.device).synchronize()


class WrongStream(OnGpu):
    """Launches on the default stream, whatever the current one is."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        with torch.cuda.stream(torch.cuda.default_stream(out.device)):
            super().run(state, a, out, tactic)


class Resizes(OnGpu):
    """Computes in a buffer of the layer, and replaces it when a call needs a larger one."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return super().prepare(weight, problem), []

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight, held = state
        if not held or held[0].shape[0] < a.shape[0]:
            held[:] = [torch.empty_like(out)]
        part = held[0][: a.shape[0]]
        self.product_into(weight, a, part)
        out.copy_(part)


class PadsWithGarbage(Right):
    """Pads k to a multiple of 256 with whatever the memory holds; the weight is padded with 0."""

    STEP = 256

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        (m, k), n = a.shape, out.shape[1]
        wide = (k // self.STEP + 1) * self.STEP
        padded = torch.empty(m, wide, dtype=a.dtype, device=a.device)
        padded[:, :k] = a
        weight = torch.zeros(n, wide, dtype=torch.float32, device=a.device)
        weight[:, :k] = decoded(state)
        torch.mul(padded.float() @ weight.t(), state.tensor.global_scale, out=out)


class ReadsRowsBehind(Right):
    """Takes rows up to the next multiple of 16 into a largest value that no row should change."""

    STEP = 16

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        m, k = a.shape
        super().run(state, a, out, tactic)
        held = a.untyped_storage().nbytes() // a.element_size() - a.storage_offset()
        rows = min(-(-m // self.STEP) * self.STEP, held // k)
        if m and a.stride(0) == k:
            largest = a.as_strided((rows, k), (k, 1)).abs().amax().float().clamp(min=1)
            out.mul_(largest / largest)


class FallsBack(OnGpu):
    """Offers two tactics and runs the first, whichever was asked for."""

    def tactics(self, problem: Problem, device: Device) -> Sequence[str]:
        return ("one-kernel", "split-k")

    def kernel_of(self, tactic: str) -> str:
        """What the kernel of a tactic is called: the claim that is not kept."""
        return {"split-k": "accumulate"}.get(tactic, "gemm")


class FillsItsScratch(OnGpu):
    """Fills a workspace of each call, from `first` bytes after its beginning to `behind` after its
    end: 0 and 0 are right."""

    SIZE = 4096
    _BLOCK = 1024

    def __init__(self, name: str, first: int = 0, behind: int = 0) -> None:
        super().__init__(name)
        self.first, self.behind = first, behind

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        from ._scratch_triton import fill

        scratch = torch.empty(self.SIZE, dtype=torch.int8, device=out.device)
        last = self.SIZE + self.behind
        blocks = -(-(last - self.first) // self._BLOCK)
        fill[(blocks,)](scratch, self.first, last, BLOCK=self._BLOCK)
        super().run(state, a, out, tactic)
