"""The tactics of `triton-w4a16`: what each is called, and which are worth timing where."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ...problem import Device, Problem

TILE_K = 128


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One tactic: tiles are bm x bn; `split` cuts k; `group` columns of tiles share the L2; `deep`
    k-tiles are one step.

    `kernel` says how activations are read: ``gemm`` through pointers, ``tma`` by the copy engine.
    """

    kernel: str
    bm: int
    bn: int
    split: int = 1
    warps: int = 4
    stages: int = 4
    group: int = 8
    deep: int = 1

    @property
    def name(self) -> str:
        return (
            f"{self.kernel}-bm{self.bm}-bn{self.bn}-sk{self.split}-w{self.warps}-s{self.stages}"
            f"-g{self.group}{f'-d{self.deep}' if self.deep > 1 else ''}"
        )

    def shared(self) -> int:
        """Bytes of shared memory a block takes, at most.

        A stage holds 16-bit activations, 4-bit weights and scales. With mma.sync the pipeline has
        one stage fewer, and the dequantised weights pass through shared memory.
        """
        stage = self.deep * (self.bm * 2 * TILE_K + self.bn * (TILE_K // 2 + 8))
        passing = self.deep * self.bn * 2 * TILE_K
        return max(self.stages * stage, (self.stages - 1) * stage + passing) + 1024


_FIELDS = {
    "bm": "bm",
    "bn": "bn",
    "sk": "split",
    "w": "warps",
    "s": "stages",
    "g": "group",
    "d": "deep",
}


@lru_cache(maxsize=4096)
def parse(tactic: str) -> TileConfig:
    """The configuration a tactic's name stands for. ValueError for a name that is not one."""
    kernel, *parts = tactic.split("-")
    values: dict[str, int] = {}
    for part in parts:
        key = part.rstrip("0123456789")
        if key in _FIELDS and len(part) > len(key):
            values[_FIELDS[key]] = int(part[len(key) :])
    if kernel in ("gemm", "tma") and {"bm", "bn"} <= values.keys():
        config = TileConfig(kernel, **values)
        # The copy engine fetches one k-tile at a time.
        if config.name == tactic and (kernel == "gemm" or config.deep == 1):
            return config
    raise ValueError(f"triton-w4a16 has no tactic {tactic!r}")


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
        256,
        (
            ("best", 128, 64, 4, 3, 2),
            ("best", 128, 64, 4, 2, 2),
            ("best", 256, 64, 4, 3, 1),
            # Three tiles up to m = 192, where taller ones multiply as much as at 256.
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

# For a small m on SM90 besides, with waves: a wgmma is as narrow as 8 there, which halves what is
# read of activations; and two k-tiles a step are waited for once. Untimed guesses.
_NARROW: tuple[tuple[float, tuple[tuple[TileConfig, int], ...]], ...] = (
    (8, ((TileConfig("gemm", 8, 64), 2), (TileConfig("gemm", 8, 64, stages=3, deep=2), 2))),
    (16, ((TileConfig("gemm", 16, 64, stages=3, deep=2), 2),)),
)


def candidates(problem: Problem, device: Device) -> Iterator[TileConfig]:
    """Configurations worth timing for the problem, best guess first, each once.

    Where the GPU (before SM90) or Triton (before 3.4) lacks TMA, pointers take its place; stages
    are taken away until a block fits its shared memory.
    """
    rows = next(rows for most, rows in _TABLE if problem.m <= most)
    best = "tma" if (device.sm or 0) >= 90 and _has_descriptors() else "gemm"
    wanted = [
        (TileConfig(best if kind == "best" else kind, bm, bn, 1, warps, stages), waves)
        for kind, bm, bn, warps, stages, waves in rows
    ]
    if device.sm == 90 and _has_descriptors():
        wanted += next((rows for most, rows in _NARROW if problem.m <= most), ())
    seen: set[TileConfig] = set()
    for config, waves in wanted:
        split = splits(problem, device, config.bm, config.bn, waves)
        config = replace(config, split=split)
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
