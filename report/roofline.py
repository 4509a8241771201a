"""How near a GEMM comes to what its GPU can do: the share of the roofline that it reaches.

A roofline (Williams, Waterman and Patterson, Communications of the ACM 52, 2009) is the least time
that moving the operands once, or computing, would take. Peaks are those of NVIDIA's datasheets,
dense and at the datasheet's clock: bytes a second of memory, and floating-point operations a second
of the tensor cores with 16-bit and with FP4 operands.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.rows import BucketKey
from .numbers import positive

_T = 1e12


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of a GPU model: bytes a second, and operations a second on bf16 and on FP4 (None: none)."""

    bytes: float
    bf16: float
    fp4: float | None = None


PEAKS: tuple[tuple[tuple[str, ...], Peaks], ...] = (
    (("h200",), Peaks(4.8 * _T, 989 * _T)),
    (("h100", "pcie"), Peaks(2.0 * _T, 756 * _T)),
    (("h100", "nvl"), Peaks(3.9 * _T, 835 * _T)),
    (("h100",), Peaks(3.35 * _T, 989 * _T)),
    (("b200",), Peaks(8.0 * _T, 2250 * _T, 9000 * _T)),
    (("a100", "80gb", "pcie"), Peaks(1.935 * _T, 312 * _T)),
    (("a100", "80gb"), Peaks(2.039 * _T, 312 * _T)),
    (("a100",), Peaks(1.555 * _T, 312 * _T)),
    (("l40s",), Peaks(0.864 * _T, 362 * _T)),
    (("rtx", "5090"), Peaks(1.792 * _T, 209.5 * _T, 1676 * _T)),
    (("rtx", "4090"), Peaks(1.008 * _T, 165.2 * _T)),
)
"""By the words that a model's name has, the narrowest first; a model that is not here has none."""


def peaks_of(gpu: str) -> Peaks | None:
    """The datasheet of a GPU model; None where it is not known, and for a part of a GPU (MIG)."""
    words = gpu.lower().replace("-", " ")
    if " mig " in f" {words} ":
        return None
    return next((peaks for names, peaks in PEAKS if all(n in words for n in names)), None)


def least_us(gpu: str, bucket: BucketKey) -> float | None:
    """Microseconds that the bucket's largest m takes at least; None where that is not known."""
    peaks, m = peaks_of(gpu), bucket.m_hi
    if peaks is None or m < 1 or bucket.groups != 1:
        return None
    flops = peaks.fp4 if bucket.activation == "fp4" else peaks.bf16
    if flops is None:
        return None
    n, k = bucket.n, bucket.k
    block = 16 if bucket.format == "nvfp4" else 32
    weight = n * k / 2 + n * k / block
    activation = m * k * (0.5 + 1 / block) if bucket.activation == "fp4" else 2.0 * m * k
    moved = (weight + activation + 2.0 * m * n) / peaks.bytes
    computed = 2.0 * m * n * k / flops
    return max(moved, computed) * 1e6


def share(gpu: str, bucket: BucketKey, us: object) -> float | None:
    """The share of the roofline that a time in microseconds reaches, 0 to 1 or a little above."""
    least, taken = least_us(gpu, bucket), positive(us)
    return None if least is None or taken is None else least / taken
