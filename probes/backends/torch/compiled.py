"""``torch-compile``: the dequantisation as one fused kernel by Inductor, then ``torch.mm``.

Inductor writes the kernel that unpacks, decodes and scales (Triton on CUDA, C++ on a CPU). It is
compiled for a stream of blocks of unknown length, ``(blocks, block/2)`` codes and ``(blocks,)``
scales, so neither m nor (n, k) is in the graph: one compilation serves every layer of a format,
and no m, 0 and 1 included, can cause another. The product is left to ``torch.mm`` (`scaled_mm`
says what is rounded where; the weight never is).

On a CPU the product is fp32: bf16 there is slower and rounds twice.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import FunctionType

import torch

from ...decoding import scale_table
from ...problem import FORMATS, Device, Format, Fp4Tensor, Problem
from .dequant import (
    TACTIC_DTYPES,
    exact_tactics,
    first_if_default,
    not_dense,
    scaled_mm,
)

Expand = Callable[..., torch.Tensor]
_INT32_MAX = 2**31 - 1


def _e2m1_values(nibble: torch.Tensor) -> torch.Tensor:
    """int32 codes 0..15 -> float32, by arithmetic that vectorises (a look-up does not on CPUs).

    Without the sign, e2m1 is convex in its code: the largest of three straight lines.
    """
    code = (nibble & 7).float()
    size = torch.maximum(torch.maximum(0.5 * code, code - 2), 2 * code - 8)
    return torch.where(nibble >= 8, -size, size)


def _pack(low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Two float32 values as one integer that holds both in `dtype`, the low one first in memory.

    One contiguous store a byte, where interleaving the values would take two strided ones.
    """
    if dtype == torch.float32:
        return (low.view(torch.int32).long() & 0xFFFFFFFF) | (high.view(torch.int32).long() << 32)
    low, high = low.to(dtype).view(torch.int16).int(), high.to(dtype).view(torch.int16).int()
    return (low & 0xFFFF) | (high << 16)


def _expand_block(
    codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """codes uint8 (b, block/2), scales uint8 (b,) -> pairs of `dtype`, packed, (b, block/2).

    table float32 (256,) holds the value of each scale byte.
    """
    byte = codes.int()
    scale = table[scales.int()].unsqueeze(1)
    return _pack(_e2m1_values(byte & 15) * scale, _e2m1_values(byte >> 4) * scale, dtype)


@contextmanager
def _plain_mode() -> Iterator[None]:
    """The same grad and inference mode in every thread, since Dynamo compiles for each anew."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Kernels:
    """The compiled `_expand` of each (device, format, dtype, index width), made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str, torch.dtype, bool], Expand] = {}
        self._lock = threading.Lock()

    def get(self, t: Fp4Tensor, dtype: torch.dtype) -> Expand:
        key = (str(t.codes.device), t.format.name, dtype, 2 * t.codes.numel() > _INT32_MAX)
        with self._lock:
            made = self._made.get(key)
            if made is None:
                # Dynamo counts compilations per code object and gives up after eight: each
                # variant gets a code object of its own.
                own = FunctionType(
                    _expand_block.__code__.replace(), _expand_block.__globals__, "expand"
                )
                made = self._made[key] = torch.compile(own, fullgraph=True)
        return made


_kernels = _Kernels()
_entering = threading.Lock()
"""Dynamo's own state is one for all threads: two that enter compiled code at the same moment may be
told that nothing was ever compiled (seen with torch 2.13 where threads switch often)."""


@cache
def _scale_table_on(fmt: Format, device: torch.device) -> torch.Tensor:
    """`scale_table`, made once a process: a copy to a GPU waits for whatever it has to do."""
    return scale_table(fmt).to(device)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A prepared weight.

    codes (b, block/2) and scales (b,) are views of its (n, k) tensors, `table` (256,) float32 the
    values of scale bytes, `kernels` the compiled `_expand` of each tactic.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    shape: tuple[int, int]
    alpha: torch.Tensor
    kernels: dict[str, Expand]

    def dequantised(self, tactic: str) -> torch.Tensor:
        """``e2m1 * scale`` as a new (n, k) tensor in the tactic's dtype."""
        dtype = TACTIC_DTYPES[tactic]
        with _entering, _plain_mode():
            packed = self.kernels[tactic](self.codes, self.scales, self.table, dtype)
        return packed.view(dtype).view(self.shape)


def _missing_tools(device: Device) -> str | None:
    """What Inductor lacks here to build a kernel for `device`, or None."""
    if device.kind == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch-compile needs the triton package to build CUDA kernels, and it is missing"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "torch-compile needs Python's C headers (Python.h), and this interpreter has none"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        return f"torch-compile needs a C++ compiler such as g++, and none was found ({error})"
    return None


class TorchCompile:
    """W4A16 by `torch.compile`; the tactic is the dtype multiplied in.

    `build` compiles; `prepare` compiles as well, should nobody have called `build`, so that `run`
    never does. A prepared weight may be used from any thread and stream at once and in CUDA graph
    capture: `run` allocates its temporaries anew on the current stream and keeps no state.
    """

    name = "torch-compile"
    activation = "bf16"
    layout = "plain"
    distributions = ("triton",)
    reference_line = False

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return not_dense(self, problem) or _missing_tools(device)

    def tactics(self, problem: Problem, device: Device) -> Sequence[str]:
        return exact_tactics(problem, device.kind)[:1]

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Compile every (format, dtype) of `problems`: about 15 s for the first, 2 s for others.

        `workers` is not needed: there is one small kernel a variant.
        """
        for problem in {(p.format, p.out_dtype): p for p in problems}.values():
            fmt = FORMATS[problem.format]
            one = Fp4Tensor(
                fmt,
                torch.zeros(2, fmt.block, dtype=torch.uint8, device=device.torch),
                torch.zeros(2, 2, dtype=torch.uint8, device=device.torch),
                torch.ones((), device=device.torch),
            )
            self.prepare(one, problem)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Compiled:
        """Views of the weight; a copy only of an inference tensor, which Dynamo guards on."""
        device, fmt = weight.codes.device, weight.format
        with _plain_mode():
            codes, scales = (
                t.clone() if t.is_inference() else t.contiguous()
                for t in (weight.codes, weight.scales)
            )
            state = Compiled(
                codes.view(-1, fmt.block // 2),
                scales.view(-1),
                _scale_table_on(fmt, device),
                weight.shape,
                weight.global_scale,
                {
                    tactic: _kernels.get(weight, TACTIC_DTYPES[tactic])
                    for tactic in exact_tactics(problem, device.type)[:1]
                },
            )
        # "maybe": not an error where there is a single block, which Dynamo compiles on its own.
        torch._dynamo.maybe_mark_dynamic(state.codes, 0)
        torch._dynamo.maybe_mark_dynamic(state.scales, 0)
        for tactic in state.kernels:
            state.dequantised(tactic)
        return state

    def run(self, state: Compiled, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        if a.shape[0] == 0:
            return
        tactic = first_if_default(tactic, state.kernels)
        scaled_mm(a.to(TACTIC_DTYPES[tactic]), state.dequantised(tactic), state.alpha, out)
