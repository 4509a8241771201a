"""`triton-w4a16`: this project's own FP4 GEMM with 16-bit activations, in Triton, SM80 and newer.

The weight stays 4-bit in memory (a quarter of the bytes of bf16) and is turned into 16-bit floats
on its way to the tensor cores. `pack` reorders the codes once, when weights load, so that each
thread finds its own in 16 consecutive bytes; how, why the kernel computes ``W @ A.T``, and why the
arithmetic is exact up to fp32 sums is told in `_triton_w4a16_kernels`. The tactics worth timing are
in `_triton_w4a16_tactics`, the packing and the launch here.

A tactic is a tile of the output (bm rows of the activation by bn rows of the weight) and a number
of splits: where the tiles are fewer than the GPU's multiprocessors, k is cut too, every piece
writes fp32 partial sums, and a second kernel adds them in order.

Nothing is shared between calls: partial sums live in a tensor of their own call, so one prepared
weight serves any number of streams, threads and CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch

from ...problem import FORMATS, Device, Fp4Tensor, Problem
from ._context import ensure_current
from ._tactics import TILE_K, TileConfig, candidates, parse

PAD_N = 128
"""Rows of the packed weight are padded to this."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight as the kernels read it.

    words   int32 (k/128, n_pad, 16): codes, in fragment order
    scales  (k/128, n_pad, 4): int16 of two E5M3 bytes (NVFP4), uint8 e8m0 (MXFP4)
    gscale  float32 (1,)
    """

    words: torch.Tensor
    scales: torch.Tensor
    gscale: torch.Tensor
    n: int
    k: int
    dtype: torch.dtype

    @property
    def mx(self) -> bool:
        return self.scales.dtype == torch.uint8


@lru_cache(maxsize=1)
def _e5m3() -> tuple[int, ...]:
    """E5M3 byte (bias 22) of each e4m3 magnitude 0..127: exact, subnormals normalised."""
    table = [0]
    for bits in range(1, 127):
        exponent, mantissa = bits >> 3, bits & 7
        if exponent == 0:  # mantissa * 2**-9
            shift = 4 - mantissa.bit_length()
            exponent, mantissa = 1 - shift, (mantissa << shift) & 7
        table.append(((exponent - 7 + 22) << 3) | mantissa)
    return (*table, 0xFF)  # 127 is NaN, and stays so


@cache
def _e5m3_on(device: torch.device) -> torch.Tensor:
    """`_e5m3` as uint8 (128,), made once a process: a copy to a GPU waits for whatever it does."""
    return torch.tensor(_e5m3(), dtype=torch.uint8, device=device)


def pack(weight: Fp4Tensor, dtype: torch.dtype) -> Packed:
    """The packed form of `weight` for activations of `dtype`, on the weight's device.

    Signs of e4m3 scales move into the codes; blocks whose scale is zero get zero codes (E5M3 as
    used here has no zero). Rows and columns of padding are zero.
    """
    from ._kernels import BITS

    n, k = weight.shape
    device = weight.codes.device
    tiles, n_pad = -(-k // TILE_K), -(-n // PAD_N) * PAD_N
    codes = torch.zeros((n_pad, tiles * TILE_K), dtype=torch.uint8, device=device)
    codes[:n, 0:k:2] = weight.codes & 15
    codes[:n, 1:k:2] = weight.codes >> 4
    block = weight.format.block
    scales = torch.zeros((n_pad, tiles * TILE_K // block), dtype=torch.uint8, device=device)
    scales[:n, : k // block] = weight.scales
    if weight.format.scale == "e4m3":
        blocks = codes.view(n_pad, -1, block)
        blocks ^= ((scales >> 7) << 3).unsqueeze(-1)
        blocks *= (scales & 0x7F).ne(0).unsqueeze(-1)
        scales = _e5m3_on(device)[(scales & 0x7F).int()].view(
            torch.int16
        )  # little-endian: two columns
    scales = scales.view(n_pad, tiles, 4).transpose(0, 1).contiguous()

    # columns 32j + 16g + 8h + 2t + p of a tile
    parts = codes.view(n_pad, tiles, 4, 2, 2, 4, 2)
    words = torch.zeros((n_pad, tiles, 4, 4), dtype=torch.int32, device=device)  # (.., j, t)
    for r, bits in enumerate(BITS["bf16" if dtype == torch.bfloat16 else "fp16"]):
        for p in (0, 1):
            code = parts[:, :, :, r // 2, r % 2, :, p].to(torch.int32)
            for i, bit in enumerate(bits):
                words |= ((code >> (3 - i)) & 1) << (bit + 16 * p)
    words = words.transpose(2, 3).reshape(n_pad, tiles, 16).transpose(0, 1).contiguous()
    gscale = weight.global_scale.to(device, torch.float32).reshape(1).clone()
    return Packed(words, scales, gscale, n, k, dtype)


def _tma_aligned(t: torch.Tensor) -> bool:
    return t.data_ptr() % 16 == 0


def _readable(a: torch.Tensor) -> bool:
    """Whether the kernels can read `a` as it lies: 16 bytes at a time, rows not overlapping.

    The stride's factor is the one `compile_for` assumes, so that no call compiles another kernel.
    """
    return (
        _tma_aligned(a) and a.stride(1) == 1 and a.stride(0) % 16 == 0 and a.stride(0) >= a.shape[1]
    )


class TritonW4A16:
    """The backend (see `backends.Backend`)."""

    name = "triton-w4a16"
    activation = "bf16"
    layout = "packed"
    distributions = ("triton",)

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return "needs a CUDA GPU"
        if device.sm < 80:
            return f"needs SM80 or newer, not SM{device.sm}"
        if problem.activation != "bf16":
            return "takes 16-bit activations only"
        if problem.groups != 1:
            return "does dense GEMMs only"
        if FORMATS[problem.format].scale == "e8m0" and problem.out_dtype == "fp16":
            return "e8m0 scales span 2**-127 to 2**127, which fp16 does not hold"
        if importlib.util.find_spec("triton") is None:
            return "needs triton"
        return None

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Packed:
        return pack(weight, problem.dtype)

    def run(self, state: Packed, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        """See `backends.Backend.run`. ValueError for an unknown tactic."""
        config = parse(tactic)
        if a.shape[0] == 0:
            return
        if not _readable(a):
            a = a.clone(memory_format=torch.contiguous_format)
        if _tma_aligned(out):
            launch(state, a, out, config)
        else:
            whole = torch.empty_like(out)
            launch(state, a, whole, config)
            out.copy_(whole)

    def tactics(self, problem: Problem, device: Device) -> tuple[str, ...]:
        return tuple(c.name for c in candidates(problem, device))

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Compile every tactic of `problems`, in threads (the compiler releases the GIL)."""
        jobs: dict[tuple[object, ...], partial[None]] = {}
        for problem in problems:
            # What a compiled kernel depends on besides its tactic; m is never part of it.
            key = (problem.format, problem.out_dtype, problem.n % 16 == 0, problem.n == 1)
            for tactic in self.tactics(problem, device) if problem.m else ():
                config = parse(tactic)
                main = replace(config, split=min(config.split, 2))
                jobs.setdefault((key, main), partial(_compile_gemm, problem, config))
                if config.split > 1:
                    reduce = partial(_compile_reduce, problem, config)
                    jobs.setdefault((key, config.split), reduce)

        def one(job: partial[None]) -> None:
            with torch.cuda.device(device.torch):
                job()

        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(one, jobs.values()))


_REDUCE_BLOCK = 512


@lru_cache(maxsize=1024)
def _constants(config: TileConfig, mx: bool, bf16: bool) -> dict[str, Any]:
    return {
        "BM": config.bm,
        "BN": config.bn,
        "GROUP": config.group,
        "SPLIT": config.split > 1,
        "TMA": config.kernel == "tma",
        "DEEP": config.deep,
        "MX": mx,
        "BF16": bf16,
        "PTX": not interpreted(),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: it has no inline PTX."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _activation_argument(a: torch.Tensor, config: TileConfig) -> Any:
    """What the kernel takes for activations `a` (m, k)."""
    if config.kernel != "tma":
        return a
    from triton.tools.tensor_descriptor import TensorDescriptor

    if a.device.type == "cuda":
        ensure_current(a.device.index)
    return TensorDescriptor(a, list(a.shape), list(a.stride()), [config.bm, TILE_K])


def launch(state: Packed, a: torch.Tensor, out: torch.Tensor, config: TileConfig) -> None:
    """Enqueue the product; a (m, k) and out (m, n) aligned to 16 bytes, m >= 1."""
    from . import _kernels as kernels

    m, n, split = a.shape[0], state.n, config.split
    target = out
    if split > 1:
        target = torch.empty((split, m, n), dtype=torch.float32, device=a.device)
    tiles_k, n_pad = state.words.shape[:2]
    grid = (-(-m // config.bm) * -(-n // config.bn), split)
    kernels.gemm[grid](
        _activation_argument(a, config),
        state.words,
        state.scales,
        state.gscale,
        target,
        m,
        n,
        state.k,
        a.stride(0),
        n_pad,
        tiles_k,
        **_constants(config, state.mx, state.dtype == torch.bfloat16),
    )
    if split > 1:
        blocks = -(-m * n // _REDUCE_BLOCK)
        kernels.reduce[(blocks,)](
            target, state.gscale, out, m * n, SPLITS=split, BLOCK=_REDUCE_BLOCK, MX=state.mx
        )


def compile_for(problem: Problem, config: TileConfig) -> None:
    """Compile and load what `launch` needs for the problem, on the current CUDA device."""
    _compile_gemm(problem, config)
    if config.split > 1:
        _compile_reduce(problem, config)


def _compile_gemm(problem: Problem, config: TileConfig) -> None:
    from . import _kernels as kernels

    mx, k = problem.format == "mxfp4", problem.k
    a: Any = problem.dtype
    if config.kernel == "tma":
        a = _activation_argument(torch.empty((1, k), dtype=problem.dtype, device="meta"), config)
    compiled = kernels.gemm.warmup(
        a,
        torch.int32,
        torch.uint8 if mx else torch.int16,
        torch.float32,
        torch.float32 if config.split > 1 else problem.dtype,
        problem.m,
        problem.n,
        k,
        k,
        -(-problem.n // PAD_N) * PAD_N,
        -(-k // TILE_K),
        grid=(1,),
        **_constants(config, mx, problem.dtype == torch.bfloat16),
    )
    _ = compiled.run  # loads the module now, rather than in a graph capture


def _compile_reduce(problem: Problem, config: TileConfig) -> None:
    from . import _kernels as kernels

    compiled = kernels.reduce.warmup(
        torch.float32,
        torch.float32,
        problem.dtype,
        problem.m * problem.n,
        SPLITS=config.split,
        BLOCK=_REDUCE_BLOCK,
        MX=problem.format == "mxfp4",
        grid=(1,),
    )
    _ = compiled.run
