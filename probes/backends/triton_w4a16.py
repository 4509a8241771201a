"""`triton-w4a16`: this project's own FP4 GEMM with 16-bit activations, in Triton, SM80 and newer.

The weight stays 4-bit in memory (a quarter of the bytes of bf16) and is turned into 16-bit floats
on its way to the tensor cores. `pack` reorders the codes once, when weights load, so that each
thread finds its own in 16 consecutive bytes; how, why the kernel computes ``W @ A.T``, and why the
arithmetic is exact up to fp32 sums is told in `_triton_w4a16_kernels`. Here are the packing, the
tactics worth timing, and the launch.

A tactic is a tile of the output (bm rows of the activation by bn rows of the weight) and a number
of splits: where the tiles are fewer than the GPU's multiprocessors, k is cut too, every piece
writes fp32 partial sums, and a second kernel adds them in order.

Nothing is shared between calls: partial sums live in a tensor of their own call, so one prepared
weight serves any number of streams, threads and CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from ..problem import FORMATS, Device, Fp4Tensor, Problem

TILE_K = 128
PAD_N = 128
"""Rows of the packed weight are padded to this."""


@dataclass(frozen=True, slots=True)
class Config:
    """One tactic: tiles are bm x bn; `split` cuts k; `group` columns of tiles share the L2.

    `kernel` says how activations are read: ``gemm`` through pointers, ``tma`` by the copy engine.
    """

    kernel: str
    bm: int
    bn: int
    split: int = 1
    warps: int = 4
    stages: int = 4
    group: int = 8

    @property
    def name(self) -> str:
        return (
            f"{self.kernel}-bm{self.bm}-bn{self.bn}-sk{self.split}-w{self.warps}-s{self.stages}"
            f"-g{self.group}"
        )

    def shared(self) -> int:
        """Bytes of shared memory a block takes, at most.

        A stage holds 16-bit activations, 4-bit weights and scales. With mma.sync the pipeline has
        one stage fewer, and the dequantised weights pass through shared memory.
        """
        stage = self.bm * 2 * TILE_K + self.bn * (TILE_K // 2 + 8)
        passing = self.bn * 2 * TILE_K
        return max(self.stages * stage, (self.stages - 1) * stage + passing) + 1024


_FIELDS = {"bm": "bm", "bn": "bn", "sk": "split", "w": "warps", "s": "stages", "g": "group"}


@lru_cache(maxsize=4096)
def parse(tactic: str) -> Config:
    """The configuration a tactic's name stands for. ValueError for a name that is not one."""
    kernel, *parts = tactic.split("-")
    values: dict[str, int] = {}
    for part in parts:
        key = part.rstrip("0123456789")
        if key in _FIELDS and len(part) > len(key):
            values[_FIELDS[key]] = int(part[len(key) :])
    if kernel in ("gemm", "tma") and {"bm", "bn"} <= values.keys():
        config = Config(kernel, **values)
        if config.name == tactic:
            return config
    raise ValueError(f"triton-w4a16 has no tactic {tactic!r}")


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


def _readable(a: torch.Tensor) -> bool:
    """Whether the kernels can read `a` as it lies: 16 bytes at a time, rows not overlapping.

    The stride's factor is the one `compile_for` assumes, so that no call compiles another kernel.
    """
    return _aligned(a) and a.stride(1) == 1 and a.stride(0) % 16 == 0 and a.stride(0) >= a.shape[1]


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
        if _aligned(out):
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


_CHIPS = {
    80: (163, 108),
    86: (99, 84),
    87: (163, 16),
    89: (99, 142),
    90: (227, 132),
    100: (227, 148),
    103: (227, 148),
    107: (227, 148),
    110: (227, 20),
    120: (99, 188),
    121: (99, 48),
}
"""By SM: KiB of shared memory a block may have, multiprocessors of its largest common GPU."""


def shared_limit(device: Device) -> int:
    """Bytes of shared memory one block may have on the device."""
    return _CHIPS.get(device.sm or 0, (99, 132))[0] * 1024


@lru_cache(maxsize=1)
def _has_descriptors() -> bool:
    """Whether this Triton takes tensor descriptors made on the host (3.4 and newer)."""
    try:
        return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    except ImportError:
        return False


# Up to m: (kernel, bm, bn, warps, stages, waves), the best guess first. `waves` says how finely k
# is cut: until there are that many blocks for each multiprocessor. ``best`` is ``tma`` where there
# is TMA, else ``gemm``: above m = 32 it won on every shape that benchmarks/tune_triton.py timed on
# an H200 (n x k of 4096 x 4096, 28672 x 4096, 4096 x 14336, 6144 x 4096). Tiles of which two fit on
# a multiprocessor do best: while one waits for its wgmma, the other decodes.
_TABLE: tuple[tuple[float, tuple[tuple[str, int, int, int, int, int], ...]], ...] = (
    (
        16,
        (
            ("gemm", 16, 64, 4, 4, 2),
            ("gemm", 16, 128, 4, 4, 2),
            ("gemm", 16, 128, 4, 4, 8),
            ("gemm", 16, 64, 4, 4, 8),
        ),
    ),
    (
        32,
        (
            ("gemm", 32, 128, 4, 4, 8),
            ("gemm", 32, 128, 4, 3, 2),
            ("gemm", 32, 64, 4, 4, 2),
        ),
    ),
    (
        64,
        (
            ("best", 64, 64, 4, 3, 2),
            ("best", 64, 128, 4, 3, 2),
        ),
    ),
    (
        128,
        (
            ("best", 128, 64, 4, 3, 2),
            ("best", 64, 64, 4, 3, 2),
            ("best", 64, 128, 4, 3, 2),
        ),
    ),
    (
        512,
        (
            ("best", 128, 64, 4, 3, 2),
            ("best", 128, 64, 4, 2, 2),
            ("best", 256, 64, 4, 3, 1),
        ),
    ),
    (
        float("inf"),
        (
            ("best", 128, 64, 4, 3, 1),
            ("best", 256, 128, 8, 3, 1),
        ),
    ),
)


def candidates(problem: Problem, device: Device) -> Iterator[Config]:
    """Configurations worth timing for the problem, best guess first, each once.

    Where the GPU (before SM90) or Triton (before 3.4) lacks TMA, pointers take its place; stages
    are taken away until a block fits its shared memory.
    """
    rows = next(rows for most, rows in _TABLE if problem.m <= most)
    seen: set[Config] = set()
    for kernel, bm, bn, warps, stages, waves in rows:
        if kernel == "best":
            tma = (device.sm or 0) >= 90 and _has_descriptors()
            kernel = "tma" if tma else "gemm"
        config = Config(kernel, bm, bn, splits(problem, device, bm, bn, waves), warps, stages)
        while config.shared() > shared_limit(device):
            config = replace(config, stages=config.stages - 1)
        if config.stages > 1 and config not in seen:
            seen.add(config)
            yield config


def splits(problem: Problem, device: Device, bm: int, bn: int, waves: int) -> int:
    """How often to cut k (1, 2, 4, 8 or 16) so that blocks come near `waves` per multiprocessor.

    A piece keeps at least 4 k-tiles, or 8 where several waves of blocks are asked for.
    """
    tiles = -(-problem.k // TILE_K)
    blocks = -(-problem.m // bm) * -(-problem.n // bn)
    most = waves * _CHIPS.get(device.sm or 0, (99, 132))[1]
    least = 4 if waves <= 2 else 8
    split = 1
    while split < 16 and blocks * split * 2 <= most and split * 2 * least <= tiles:
        split *= 2
    return split


_REDUCE_BLOCK = 512


@lru_cache(maxsize=1024)
def _constants(config: Config, mx: bool, bf16: bool) -> dict[str, Any]:
    return {
        "BM": config.bm,
        "BN": config.bn,
        "GROUP": config.group,
        "SPLIT": config.split > 1,
        "TMA": config.kernel == "tma",
        "MX": mx,
        "BF16": bf16,
        "PTX": not interpreted(),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: it has no inline PTX."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _activation(a: torch.Tensor, config: Config) -> Any:
    """What the kernel takes for activations `a` (m, k)."""
    if config.kernel != "tma":
        return a
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(a, list(a.shape), list(a.stride()), [config.bm, TILE_K])


def launch(state: Packed, a: torch.Tensor, out: torch.Tensor, config: Config) -> None:
    """Enqueue the product; a (m, k) and out (m, n) aligned to 16 bytes, m >= 1."""
    from . import _triton_w4a16_kernels as kernels

    m, n, split = a.shape[0], state.n, config.split
    target = out
    if split > 1:
        target = torch.empty((split, m, n), dtype=torch.float32, device=a.device)
    tiles_k, n_pad = state.words.shape[:2]
    grid = (-(-m // config.bm) * -(-n // config.bn), split)
    kernels.gemm[grid](
        _activation(a, config),
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


def compile_for(problem: Problem, config: Config) -> None:
    """Compile and load what `launch` needs for the problem, on the current CUDA device."""
    _compile_gemm(problem, config)
    if config.split > 1:
        _compile_reduce(problem, config)


def _compile_gemm(problem: Problem, config: Config) -> None:
    from . import _triton_w4a16_kernels as kernels

    mx, k = problem.format == "mxfp4", problem.k
    a: Any = problem.dtype
    if config.kernel == "tma":
        a = _activation(torch.empty((1, k), dtype=problem.dtype, device="meta"), config)
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


def _compile_reduce(problem: Problem, config: Config) -> None:
    from . import _triton_w4a16_kernels as kernels

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
