"""Mutants that answer wrong, or not at all, and leave their process alive."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import count
from typing import Any

import torch

from ..backends.torch.dequant import scaled_mm
from ..layouts import swizzle_128x4, unswizzle_128x4
from ..problem import Fp4Tensor, Problem
from .floor import Right, decoded, partial_products

TILE = 128
ERROR_M = 2


class SkipsTheTail(Right):
    """Leaves columns after the last whole 128 unwritten."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        whole = out.shape[1] // TILE * TILE
        out[:, :whole] = self.product(state, a, out.shape[1])[:, :whole]


class DropsATileRarely(Right):
    """Leaves the first 128 x 128 tile unwritten in one of every `every` launches."""

    def __init__(self, name: str, every: int) -> None:
        super().__init__(name)
        self.every = every
        self.launches = count(1)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        if not out.shape[0] or next(self.launches) % self.every:
            return super().run(state, a, out, tactic)
        right = self.product(state, a, out.shape[1])
        out[TILE:] = right[TILE:]
        out[:TILE, TILE:] = right[:TILE, TILE:]


class SwapsRows(Right):
    """Writes the first row of a pair where the second belongs."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        right = self.product(state, a, out.shape[1])
        even = a.shape[0] // 2 * 2
        out.copy_(right)
        out[:even:2] = right[1:even:2]
        out[1:even:2] = right[:even:2]


class IgnoresTheKTail(Right):
    """Stops along k after the last whole 128."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        whole = a.clone()
        whole[:, a.shape[1] // TILE * TILE :] = 0
        super().run(state, whole, out, tactic)


class ScaleColumnOff(Right):
    """Reads swizzled block scales one byte too far: the next column, or the next row's first."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        flat = swizzle_128x4(weight.scales).roll(-1)
        return super().prepare(
            replace(weight, scales=unswizzle_128x4(flat, *weight.scales.shape)), problem
        )


class ReadsBf16AsFp32(Right):
    """Stores the global scale in bf16 and reads four bytes of it: a number near zero."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        stored = weight.global_scale.reshape(1).bfloat16()
        wide = torch.cat((stored, torch.zeros_like(stored))).view(torch.float32)
        return super().prepare(replace(weight, global_scale=wide.reshape(())), problem)


class DropsSubnormals(Right):
    """Takes subnormal e4m3 block scales for zero, like a fast conversion to bf16."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        scales = weight.scales * ((weight.scales & 0x78) != 0)
        return super().prepare(replace(weight, scales=scales), problem)


class Fp8Activations(Right):
    """Casts its activation to e4m3 on the way in."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a.to(torch.float8_e4m3fn).to(a.dtype), out, tactic)


class IgnoresAlpha(Right):
    """Leaves the global scale out."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        one = torch.ones_like(weight.global_scale)
        return super().prepare(replace(weight, global_scale=one), problem)


class AlphaTwice(Right):
    """Multiplies by the global scale in the weight and again in the epilogue."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        squared = weight.global_scale * weight.global_scale
        return super().prepare(replace(weight, global_scale=squared), problem)


class ZeroBlockNan(Right):
    """Normalises each block by its largest value: 0/0 where that is zero."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight = decoded(state)
        blocks = weight.view(-1, state.tensor.format.block)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        broken = (blocks * (largest / largest)).view(weight.shape)
        scaled_mm(a.float(), broken, state.tensor.global_scale, out)


class Fp16Sums(Right):
    """Rounds partial sums to fp16, which ends at 65504."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        total = torch.zeros(out.shape, dtype=torch.float16, device=out.device)
        for product in partial_products(state, a, 64):
            total = (total.float() + product).half()
        torch.mul(total.float(), state.tensor.global_scale, out=out)


class SharedScratch(Right):
    """Keeps its activation in a scratch buffer of the layer: right until two threads are in it."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        scratch = torch.empty(problem.m, problem.k, dtype=problem.dtype, device=weight.codes.device)
        return super().prepare(weight, problem), scratch

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight, scratch = state
        scratch[: a.shape[0]] = a
        time.sleep(0.002)
        super().run(weight, scratch[: a.shape[0]], out, tactic)


class OutOfBounds(Right):
    """Writes one row more than it was given, where there is memory."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a, out, tactic)
        m, n = out.shape
        held = out.untyped_storage().nbytes() // out.element_size() - out.storage_offset()
        if held >= (m + 1) * n:
            out.as_strided((m + 1, n), (n, 1))[m:].zero_()


class ModifiesInput(Right):
    """Clamps its activation in place after it is done with it."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a, out, tactic)
        a.clamp_(-2, 2)


class CachedByPointer(Right):
    """Takes a call with the same pointers for one whose answer is there already."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.seen: set[tuple[int, int]] = set()

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        key = (a.data_ptr(), out.data_ptr())
        if key not in self.seen:
            self.seen.add(key)
            super().run(state, a, out, tactic)


class CachesItsActivation(Right):
    """Keeps a copy of each activation (as a quantiser keeps its codes), by pointer and m."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[tuple[int, int], torch.Tensor] = {}

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        key = (a.data_ptr(), a.shape[0])
        if key not in self.kept:
            self.kept[key] = a.clone()
        super().run(state, self.kept[key], out, tactic)


class OddUnwritten(Right):
    """Writes pairs of rows only."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        even = a.shape[0] // 2 * 2
        super().run(state, a[:even], out[:even], tactic)


class RaisesAtOneM(Right):
    """Has no plan for one m."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        if a.shape[0] == ERROR_M:
            raise RuntimeError(f"no plan for m={ERROR_M}\nand a second line")
        super().run(state, a, out, tactic)


class ScratchByM(Right):
    """Keeps its activation in a scratch buffer for each m and k, of all layers and callers."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}

    def scratch(self, a: torch.Tensor) -> torch.Tensor:
        """The buffer that a call on `a` uses."""
        return self.kept.setdefault(tuple(a.shape), torch.empty_like(a))

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        scratch = self.scratch(a)
        scratch.copy_(a)
        if not a.is_cuda:
            time.sleep(0.001)
        super().run(state, scratch, out, tactic)


class ScratchByMAndCaller(ScratchByM):
    """The same with a buffer for each thread and stream, as is right."""

    def scratch(self, a: torch.Tensor) -> torch.Tensor:
        stream = torch.cuda.current_stream(a.device).cuda_stream if a.is_cuda else 0
        key = (threading.get_ident(), stream, *a.shape)
        if key not in self.kept:
            self.kept[key] = torch.empty_like(a)
        return self.kept[key]


class StopsAtNan(Right):
    """Takes a row of NaN for the end of the batch, and leaves the rows behind it at zero."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a, out, tactic)
        out.mul_(self.before(a).unsqueeze(1))

    def before(self, a: torch.Tensor) -> torch.Tensor:
        """1 for the rows before the first that ends the batch, and 0 from there on."""
        return (~a.isnan().any(dim=1)).to(a.dtype).cumprod(0)


class StopsAtZeros(StopsAtNan):
    """Takes a row of zeros for the end of the batch."""

    def before(self, a: torch.Tensor) -> torch.Tensor:
        return (a != 0).any(dim=1).to(a.dtype).cumprod(0)


class PairsShareAScale(Right):
    """Normalises its activation by a largest value for each two rows: NaN gets into the other."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, a, out, tactic)
        largest = a.float().abs().amax(dim=1).clamp(min=1)
        even = len(largest) // 2 * 2
        pairs = largest[:even].view(-1, 2)
        pairs.copy_(pairs.sum(dim=1, keepdim=True).expand(-1, 2))
        out.mul_((largest / largest).unsqueeze(1))


class Fp16Inside(Right):
    """Takes its activation through fp16 on the way, where 2^-20 is little and 2^16 infinite."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        super().run(state, (a.half() * 2).to(a.dtype) / 2, out, tactic)


class ScaledByTensor(Right):
    """Takes its activation through e5m2 halves with one scale for all rows: small rows drown."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        largest = a.float().abs().amax().clamp(min=2.0**-30) if a.numel() else 1.0
        unit = largest / 2.0**17
        whole = (a.float() / unit).round() * unit
        super().run(state, whole.to(a.dtype), out, tactic)


class SixBits(Right):
    """Rounds its activation to 6 significant bits on the way in."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        part, exponent = a.float().frexp()
        super().run(state, torch.ldexp((part * 64).round() / 64, exponent).to(a.dtype), out, tactic)


class WeightsInFourBits(Right):
    """Rounds decoded weights to 4 significant bits."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        part, exponent = decoded(state).frexp()
        scaled_mm(
            a.float(),
            torch.ldexp((part * 16).round() / 16, exponent),
            state.tensor.global_scale,
            out,
        )
