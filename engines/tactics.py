"""Pinning FlashInfer's tactics: an autotune cache and a blocklist, which belong together.

FlashInfer's blocklist filters what its tuner may try, but neither its fallback (tactic -1) nor a
winner that a cache brings; its cache brings winners, but lets the tuner try anything where it has
none. So the cache holds the proven tactic of every bucket, and the blocklist everything else.
Keys are built by FlashInfer's own code, so importing this imports it, and torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.reader import Reader
from . import names
from .pinning import BLOCKLIST as VARIABLE
from .pinning import FALLBACK, OP, value
from .select import Bucket

__all__ = ["BLOCKLIST", "CACHE", "FALLBACK", "OP", "VARIABLE", "Pin", "files", "keys", "value"]

CACHE, BLOCKLIST = "flashinfer-autotune.json", "flashinfer-blocklist.json"
INTEGERS = 512
"""Runners that number their tactics have fewer than this; blocking a number there is not is
harmless."""

_BLOCK = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True, slots=True)
class Pin:
    """The proven tactic of one bucket: `tactic` as in choices.db, ``default`` or JSON. Without
    `m_lo`, FlashInfer's bucket around `m_hi` alone."""

    backend: str
    n: int
    k: int
    m_hi: int
    tactic: str
    format: str = "nvfp4"
    out_dtype: str = "bf16"
    m_lo: int | None = None

    @property
    def landmarks(self) -> list[int]:
        """One m at least in each bucket of FlashInfer's that has an m of this one: they end at
        powers of two and at multiples of 256."""
        low = self.m_hi if self.m_lo is None else self.m_lo
        ends = {1 << at for at in range(32)} | set(range(256, self.m_hi + 1, 256))
        return sorted({max(low, 1), self.m_hi, *(m for m in ends if low <= m <= self.m_hi)})


def _extras(runner: str, pin: Pin) -> tuple[Any, ...]:
    """What a runner of FlashInfer 0.7 adds to its key, beside shapes."""
    torch = importlib.import_module("torch")
    out = {"bf16": torch.bfloat16, "fp16": torch.float16}[pin.out_dtype]
    nvfp4 = pin.format == "nvfp4"
    if runner == "CudnnFp4GemmRunner":
        return (out, _BLOCK[pin.format], nvfp4, nvfp4)
    if runner == "TrtllmGemmRunner":
        types = importlib.import_module("flashinfer.tllm_enums").DtypeTrtllmGen
        return (False, int(types.E2m1), int(types.Bfloat16))
    return ()


def _tuner() -> Any:
    """The module of FlashInfer's tuner: a package since 0.7. Raises ImportError without FlashInfer,
    ValueError where its tuner keeps no files."""
    found = importlib.import_module("flashinfer.autotuner")
    if not hasattr(found.AutoTuner, "load_configs"):
        raise ValueError("this FlashInfer's tuner loads no tactics: use fp4tune's plugin")
    if hasattr(found, "_collect_metadata"):
        return found
    return importlib.import_module("flashinfer.autotuner.autotuner")


def pins_of(
    reader: Reader, backend: str, buckets: Sequence[Bucket], fmt: str
) -> tuple[list[Pin], dict[str, list[str]]]:
    """The pins of these buckets, and by backend the tactics that are known and not among them."""
    pins = [
        Pin(backend, n, k, m_hi, d.tactic, fmt, m_lo=m_lo)
        for n, k, m_lo, m_hi, d in buckets
        if m_hi > 0
    ]
    proven = {pin.tactic for pin in pins}
    others = {
        row["tactic"]
        for row in reader.rows("candidate")
        if row["backend"] == backend and row["tactic"] not in proven
    }
    return pins, {backend: sorted(others)}


def keys(pin: Pin) -> list[str]:
    """The keys under which FlashInfer looks for this bucket.

    Two: alpha is a scalar in one engine and a vector of one in another, and its shape is part of
    the key. Raises ValueError where FlashInfer keeps no tactics of the backend.
    """
    runner = names.NAMES[pin.backend].runner if pin.backend in names.NAMES else None
    if runner is None:
        raise ValueError(f"FlashInfer keeps no tactics of {pin.backend}")
    tuner = importlib.import_module("flashinfer.autotuner")
    base = importlib.import_module("flashinfer.gemm.gemm_base")
    config = base._MM_FP4_TUNING_CONFIG_128x4
    columns = -(-(pin.k // _BLOCK[pin.format]) // 4) * 4
    rows = -(-pin.n // 128) * 128
    alphas = ((1,), ()) if pin.format == "nvfp4" else ((0,),)
    found: list[str] = []
    for m, alpha in ((m, alpha) for m in pin.landmarks for alpha in alphas):
        shapes = (
            (m, pin.k // 2),
            (pin.k // 2, pin.n),
            (128, columns),
            (columns, rows),
            alpha,
            (0,),
            (m, pin.n),
            (0,),
            (0,),
            (base.DEFAULT_WORKSPACE_SIZE,),  # part of the key before 0.7
        )
        profile = tuner.AutoTuner._find_nearest_profile(shapes, config)
        if hasattr(tuner, "ProfilingCacheKey"):
            key = tuner.ProfilingCacheKey(OP, runner, 0, profile, _extras(runner, pin))
            found.append(key.file_key)
        else:  # before 0.7
            found.append(str((OP, runner, profile)))
    return list(dict.fromkeys(found))


def files(
    pins: Iterable[Pin], others: Mapping[str, Iterable[str]] | None = None
) -> dict[str, dict[str, Any]]:
    """File name to content, for both files.

    `others`: backend -> tactics that are known and not proven, blocked besides all numbers that
    are not pinned. Raises ValueError without a pin: neither file is any good alone.
    """
    pins = list(pins)
    if not pins:
        raise ValueError("no tactic of FlashInfer's is proven here, so there is nothing to pin")
    tuner = _tuner()
    meta = tuner._collect_metadata()
    base = importlib.import_module("flashinfer.gemm.gemm_base")
    # With the policy of FlashInfer's own tuner, or that would tune the bucket again.
    policy = []
    if hasattr(tuner.AutoTuner, "_profiling_policy"):
        policy = [list(tuner.AutoTuner._profiling_policy(base._MM_FP4_TUNING_CONFIG_128x4))]
    cache: dict[str, Any] = {"_metadata": meta}
    proven: dict[str, list[Any]] = {}
    for pin in pins:
        tactic = value(pin.tactic)
        runner = names.NAMES[pin.backend].runner
        for key in keys(pin):
            cache[key] = [runner, tactic, *policy]
        proven.setdefault(pin.backend, []).append(tactic)
    blocked: dict[str, list[Any]] = {}
    for backend, kept in proven.items():
        known = [value(t) for t in (others or {}).get(backend, ())]
        numbers: list[Any] = []
        if all(isinstance(t, int) for t in (*kept, *known)):
            numbers = list(range(INTEGERS))
        unproven = [t for t in (*numbers, *known) if t not in kept and t != FALLBACK]
        runner = names.NAMES[backend].runner
        blocked[f"{OP}::{runner}"] = [t for i, t in enumerate(unproven) if t not in unproven[:i]]
    return {
        CACHE: cache,
        BLOCKLIST: {"_metadata": meta, "invalid_tactics": blocked},
    }
