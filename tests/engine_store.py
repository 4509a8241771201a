"""A store such as a probe of each SM leaves behind, for the tests of the engines' side."""

from __future__ import annotations

from pathlib import Path

from fp4tune.cache import publish
from fp4tune.cache.rows import BucketKey, Candidate, Choice, Environment

BUCKETS = ((0, 0), (1, 1), (2, 16), (17, 256))
LAYERS = ((4096, 2048), (6144, 4096))

SCOPES = {
    "sm90": ("NVIDIA H200", "bf16"),
    "sm100": ("NVIDIA B200", "fp4"),
    "sm120": ("NVIDIA RTX PRO 6000", "fp4"),
}
LAYOUTS = {
    "marlin": "marlin",
    "vllm-marlin": "marlin",
    "humming": "humming",
    "flashinfer-trtllm": "shuffled",
}

# backend: time in us, or None where it is unsafe; the engines would run another by themselves
FIELDS = {
    "sm90": {
        "torch-dequant": 100.0,
        "triton-w4a16": 7.0,
        "humming": 14.0,
        "marlin": 12.0,
        "vllm-marlin": 9.0,
    },
    "sm100": {
        "torch-dequant-w4a4": 100.0,
        "flashinfer-cudnn": 8.0,
        "flashinfer-cute-dsl": 9.0,
        "flashinfer-cutlass": None,
        "flashinfer-trtllm": 10.0,
    },
    "sm120": {
        "torch-dequant-w4a4": 100.0,
        "flashinfer-b12x": 7.0,
        "flashinfer-cudnn": 9.0,
        "flashinfer-cutlass": None,
    },
}
CONDITION = {"id": "one-stream-per-layer", "text": "a layer's weight is never used on two streams"}


def fill(
    place: Path,
    arch: str,
    field: dict[str, float | None] | None = None,
    *,
    profile: str = "strict",
    tactic: str = "default",
    unsafe_at: dict[str, int] | None = None,
    conditions: tuple[dict, ...] = (),
    versions: dict[str, str] | None = None,
) -> int:
    """Publish what a probe of `arch` may find; `unsafe_at`: backend to the one m_lo it fails in;
    `versions`: what all of it was measured with."""
    gpu, activation = SCOPES[arch]
    field = FIELDS[arch] if field is None else field
    environments = {
        name: Environment(
            name.encode().hex().ljust(64, "0")[:64],
            name,
            arch,
            {"distributions": versions} if versions else {},
        )
        for name in field
    }
    choices, candidates = [], []
    for n, k in LAYERS:
        for lo, hi in BUCKETS:
            bucket = BucketKey("nvfp4", activation, "bf16", 1, lo, hi, n, k)
            safe = [
                name
                for name, time in sorted(field.items(), key=lambda pair: pair[1] or 0)
                if time is not None and (unsafe_at or {}).get(name) != lo
            ]
            for name, time in field.items():
                key = (arch, gpu, profile, bucket, name, tactic, LAYOUTS.get(name, "swizzled"))
                rank = safe.index(name) if name in safe else None
                verdict = "unsafe" if rank is None else "safe"
                print_ = environments[name].fingerprint
                candidates.append(
                    Candidate(
                        *key, verdict, rank, time and time + hi / 100, launches=30, problems=12,
                        conditions=conditions if rank is not None else (), fingerprint=print_,
                    )
                )  # fmt: skip
                if rank == 0:
                    choices.append(
                        Choice(
                            *key, "safe", conditions, time and time + hi / 100, 30, 12,
                            fingerprint=print_, default_backend=None,
                        )
                    )  # fmt: skip
    return publish.publish(place, choices, candidates, environments.values())
