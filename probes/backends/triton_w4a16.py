"""`triton-w4a16`: this project's own FP4 GEMM with 16-bit activations, in Triton, SM80 and newer.

The kernels, the packed layout and why the arithmetic is exact are in `_triton_w4a16_kernels`. Here
are packing, the configurations worth timing, and the launch. Nothing is shared between calls: a
split-K partial sum lives in a tensor of its own call, so one prepared weight serves any number of
streams, threads and CUDA graphs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..problem import FORMATS, Device, Fp4Tensor, Problem

TILE_K = 128
PAD_N = 128
"""Rows of the packed weight are padded to this; no tile is taller."""

_SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 107: 227, 110: 227}
"""KiB of shared memory a block may have, by SM; 99 elsewhere (86, 89, 120, 121)."""


@dataclass(frozen=True, slots=True)
class Config:
    """One tactic: `kernel` is ``gemm`` or ``decode``; tiles are bm x bn; `split` cuts k."""

    kernel: str
    bm: int
    bn: int
    split: int = 1
    warps: int = 4
    stages: int = 4
    group: int = 8

    @property
    def name(self) -> str:
        if self.kernel == "decode":
            return f"decode-bm{self.bm}-bn{self.bn}-w{self.warps}-s{self.stages}"
        return (
            f"gemm-bm{self.bm}-bn{self.bn}-sk{self.split}-w{self.warps}-s{self.stages}"
            f"-g{self.group}"
        )

    def shared(self) -> int:
        """Bytes of shared memory the pipeline's stages take, at most."""
        parts = self.warps if self.kernel == "decode" else 1
        return self.stages * parts * (self.bm * 2 * TILE_K + self.bn * (TILE_K // 2 + 8)) + 1024


_FIELDS = {"bm": "bm", "bn": "bn", "sk": "split", "w": "warps", "s": "stages", "g": "group"}


@lru_cache(maxsize=4096)
def parse(tactic: str) -> Config:
    """The configuration a tactic's name stands for. ValueError for a name that is not one."""
    kernel, *parts = tactic.split("-")
    values: dict[str, int] = {}
    for part in parts:
        key = part.rstrip("0123456789")
        digits = part[len(key) :]
        if key not in _FIELDS or not digits:
            raise ValueError(f"triton-w4a16 has no tactic {tactic!r}")
        values[_FIELDS[key]] = int(digits)
    if kernel not in ("gemm", "decode") or not {"bm", "bn"} <= values.keys():
        raise ValueError(f"triton-w4a16 has no tactic {tactic!r}")
    config = Config(kernel, **values)
    if config.name != tactic:
        raise ValueError(f"triton-w4a16 has no tactic {tactic!r}")
    return config


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


def pack(weight: Fp4Tensor, dtype: torch.dtype) -> Packed:
    """The packed form of `weight` for activations of `dtype`, on the weight's device.

    Signs of e4m3 scales move into the codes; blocks whose scale is zero get zero codes (E5M3 as
    used here has no zero). Rows and columns of padding are zero.
    """
    from ._triton_w4a16_kernels import BITS

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
        table = torch.tensor(_e5m3(), dtype=torch.uint8, device=device)
        scales = table[(scales & 0x7F).int()].view(torch.int16)  # little-endian: two columns
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


def _aligned(t: torch.Tensor) -> bool:
    return t.data_ptr() % 16 == 0


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
        m = a.shape[0]
        if m == 0:
            return
        # Loads are 16 bytes wide; a view that does not allow it is copied first.
        if a.stride(1) != 1 or a.stride(0) % 8 or not _aligned(a):
            a = a.contiguous() if _aligned(a) else a.clone(memory_format=torch.contiguous_format)
        if _aligned(out):
            launch(state, a, out, parse(tactic))
        else:
            whole = torch.empty_like(out)
            launch(state, a, whole, parse(tactic))
            out.copy_(whole)

    def tactics(self, problem: Problem, device: Device) -> tuple[str, ...]:
        limit = _SHARED.get(device.sm or 0, 99) * 1024
        fit = (c.name for c in candidates(problem, device) if c.shared() <= limit)
        return tuple(dict.fromkeys(fit))[:10]

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Compile every tactic of `problems`, in threads (the compiler releases the GIL)."""
        jobs: dict[tuple[Any, ...], tuple[Problem, Config]] = {}
        for problem in problems:
            for tactic in self.tactics(problem, device) if problem.m else ():
                config = parse(tactic)
                key = (problem.format, problem.dtype, problem.n % 16 == 0, problem.n, problem.k)
                shape = (config.kernel, config.bm, config.bn, config.split > 1, config.warps)
                reduce = config.split if config.split > 1 else 0
                jobs[(*key, *shape, config.stages, config.group, reduce)] = (problem, config)

        def one(job: tuple[Problem, Config]) -> None:
            with torch.cuda.device(device.torch):
                compile_for(*job)

        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(one, jobs.values()))


def candidates(problem: Problem, device: Device) -> Iterator[Config]:
    """Configurations worth timing for the problem's m, best guess first."""
    m, n = problem.m, problem.n
    tiles = -(-problem.k // TILE_K)

    def splits(bm: int, bn: int, blocks: int) -> int:
        """The power of two of split-K that brings the grid nearest to `blocks`."""
        grid = -(-m // bm) * -(-n // bn)
        split = 1
        while grid * split * 2 <= blocks and split * 2 <= tiles // 2 and split < 16:
            split *= 2
        return split

    if m <= 16:
        for bn, warps, stages in ((16, 4, 3), (16, 8, 2), (32, 4, 3), (16, 4, 2)):
            yield Config("decode", 16, bn, 1, warps, stages)
        for bn, blocks in ((64, 264), (64, 528), (128, 264)):
            yield Config("gemm", 16, bn, splits(16, bn, blocks), 4, 4)
    elif m <= 64:
        bm = 32 if m <= 32 else 64
        for bn, blocks, stages in ((64, 264, 4), (64, 528, 3), (128, 264, 4), (128, 132, 4)):
            yield Config("gemm", bm, bn, splits(bm, bn, blocks), 4, stages)
        yield Config("decode", 16, 16, 1, 4, 3)
    elif m <= 256:
        for bm, bn, blocks, warps, stages in (
            (64, 128, 264, 4, 3),
            (128, 128, 132, 8, 3),
            (128, 64, 264, 4, 3),
            (128, 128, 132, 4, 3),
            (64, 64, 264, 4, 4),
        ):
            yield Config("gemm", bm, bn, splits(bm, bn, blocks), warps, stages)
    else:
        for bm, bn, warps, stages, group in (
            (128, 128, 4, 3, 8),
            (128, 128, 8, 3, 8),
            (256, 128, 8, 3, 8),
            (256, 128, 8, 2, 8),
            (128, 64, 4, 3, 8),
            (64, 128, 4, 4, 8),
        ):
            yield Config("gemm", bm, bn, 1, warps, stages, group)
        yield Config("gemm", 128, 128, splits(128, 128, 264), 8, 3)


_REDUCE_BLOCK = 512


def _arguments(
    state: Packed, a: Any, out: Any, m: int, stride: int, config: Config
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the main kernel is called with; a and out are tensors, or dtypes when only compiling."""
    tiles, n_pad = state.words.shape[:2]
    args = [a, state.words, state.scales, state.gscale, out, m, state.n, state.k, stride, n_pad]
    constants = {
        "BM": config.bm,
        "BN": config.bn,
        "MX": state.mx,
        "BF16": state.dtype == torch.bfloat16,
        "PTX": ptx(),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    if config.kernel == "decode":
        return (*args, tiles), {**constants, "WARPS": config.warps}
    per_split = -(-tiles // config.split)
    constants |= {"GROUP": config.group, "SPLIT": config.split > 1}
    return (*args, tiles, per_split), constants


@lru_cache(maxsize=1)
def ptx() -> bool:
    """False under Triton's interpreter, which has no inline PTX."""
    from triton import knobs

    return not knobs.runtime.interpret


def launch(state: Packed, a: torch.Tensor, out: torch.Tensor, config: Config) -> None:
    """Enqueue the product; a (m, k) and out (m, n) aligned to 16 bytes, m >= 1."""
    from . import _triton_w4a16_kernels as kernels

    m, n = a.shape[0], state.n
    tiles_m, tiles_n = -(-m // config.bm), -(-n // config.bn)
    target, grid = out, (tiles_m * tiles_n, config.split)
    if config.kernel == "decode":
        grid = (tiles_n, tiles_m)
    elif config.split > 1:
        target = torch.empty((config.split, m, n), dtype=torch.float32, device=a.device)
    args, constants = _arguments(state, a, target, m, a.stride(0), config)
    getattr(kernels, config.kernel)[grid](*args, **constants)
    if config.split > 1:
        blocks = -(-m * n // _REDUCE_BLOCK)
        kernels.reduce[(blocks,)](
            target, state.gscale, out, m * n, SPLITS=config.split, BLOCK=_REDUCE_BLOCK, MX=state.mx
        )


def compile_for(problem: Problem, config: Config) -> None:
    """Compile and load what `launch` needs for the problem, on the current CUDA device."""
    from . import _triton_w4a16_kernels as kernels

    meta = torch.device("meta")
    tiles, n_pad = -(-problem.k // TILE_K), -(-problem.n // PAD_N) * PAD_N
    mx = problem.format == "mxfp4"
    state = Packed(
        torch.empty((tiles, n_pad, 16), dtype=torch.int32, device=meta),
        torch.empty((tiles, n_pad, 4), dtype=torch.uint8 if mx else torch.int16, device=meta),
        torch.empty((1,), dtype=torch.float32, device=meta),
        problem.n,
        problem.k,
        problem.dtype,
    )
    target = torch.float32 if config.split > 1 else problem.dtype
    args, constants = _arguments(state, problem.dtype, target, problem.m, problem.k, config)
    types = [x.dtype if isinstance(x, torch.Tensor) else x for x in args]
    compiled = [getattr(kernels, config.kernel).warmup(*types, grid=(1,), **constants)]
    if config.split > 1:
        compiled.append(
            kernels.reduce.warmup(
                torch.float32,
                torch.float32,
                problem.dtype,
                problem.m * problem.n,
                SPLITS=config.split,
                BLOCK=_REDUCE_BLOCK,
                MX=mx,
                grid=(1,),
            )
        )
    for kernel in compiled:
        _ = kernel.run  # loads the module now, rather than in a graph capture
