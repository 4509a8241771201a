"""Pinning FlashInfer's tactics: an autotune cache and a blocklist, which belong together.

FlashInfer's blocklist filters what its tuner may try, but neither its fallback (tactic -1) nor a
winner that a cache brings; its cache brings winners, but lets the tuner try anything where it has
none. So the cache holds the proven tactic of every bucket, and the blocklist everything else.
Keys are built by FlashInfer's own code, so importing this imports it, and torch.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import names

CACHE, BLOCKLIST = "flashinfer-autotune.json", "flashinfer-blocklist.json"
VARIABLE = "FLASHINFER_TACTICS_BLOCKLIST"
OP = "fp4_gemm"
FALLBACK = -1
"""FlashInfer's own default tactic; what `fp4tune probe` calls ``default``."""
INTEGERS = 512
"""Runners that number their tactics have fewer than this; blocking a number there is not is
harmless."""

_BLOCK = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True, slots=True)
class Pin:
    """The proven tactic of one bucket: `tactic` as in choices.db, ``default`` or JSON."""

    backend: str
    n: int
    k: int
    m_hi: int
    tactic: str
    format: str = "nvfp4"
    out_dtype: str = "bf16"


def value(tactic: str) -> Any:
    """A stored tactic as FlashInfer's JSON has it. Raises ValueError for one that is none."""
    if tactic == "default":
        return FALLBACK
    try:
        return json.loads(tactic)
    except ValueError:
        raise ValueError(f"{tactic!r} is not a FlashInfer tactic") from None


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
    found = []
    for alpha in ((1,), ()) if pin.format == "nvfp4" else ((0,),):
        shapes = (
            (pin.m_hi, pin.k // 2),
            (pin.k // 2, pin.n),
            (128, columns),
            (columns, rows),
            alpha,
            (0,),
            (pin.m_hi, pin.n),
            (0,),
            (0,),
            (1,),
        )
        profile = tuner.AutoTuner._find_nearest_profile(shapes, config)
        key = tuner.ProfilingCacheKey(OP, runner, 0, profile, _extras(runner, pin))
        found.append(key.file_key)
    return found


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
    tuner = importlib.import_module("flashinfer.autotuner.autotuner")
    meta = tuner._collect_metadata()
    base = importlib.import_module("flashinfer.gemm.gemm_base")
    policy = list(tuner.AutoTuner._profiling_policy(base._MM_FP4_TUNING_CONFIG_128x4))
    cache: dict[str, Any] = {"_metadata": meta}
    proven: dict[str, list[Any]] = {}
    for pin in pins:
        tactic = value(pin.tactic)
        runner = names.NAMES[pin.backend].runner
        for key in keys(pin):
            # With the policy of FlashInfer's own tuner, or that would tune the bucket again.
            cache[key] = [runner, tactic, policy]
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
