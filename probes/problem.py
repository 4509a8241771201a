"""The words everything else is written in: formats, problems, FP4 tensors and devices.

A *problem* is ``out(m, n) = alpha * A(m, k) @ B(n, k).T`` with an FP4 weight ``B``. Values here are
plain data, and need no torch; drawing operands is `data`, numbers are `formats`, and running is
`backends`. `Device` is the ground's, and named here for backends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..machine.device import Device as Device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Format:
    """A block-scaled FP4 format: e2m1 codes with one scale per `block` elements along k."""

    name: str
    block: int
    scale: str
    """Encoding of a block scale: ``e4m3`` or ``e8m0`` (a biased power of two)."""
    has_global: bool
    """Whether one fp32 global scale per tensor multiplies every block scale."""


NVFP4 = Format("nvfp4", 16, "e4m3", True)
MXFP4 = Format("mxfp4", 32, "e8m0", False)
FORMATS = {f.name: f for f in (NVFP4, MXFP4)}

OUT_DTYPES = ("bf16", "fp16")
ACTIVATIONS = ("bf16", "fp4")


@dataclass(frozen=True, slots=True)
class Problem:
    """One GEMM: what a backend is asked to compute.

    `activation` is the left operand as the GEMM sees it: ``fp4`` (W4A4) or ``bf16`` (W4A16, which
    then has the output's 16-bit dtype). `groups` is 1 for a dense GEMM.

    Raises ValueError, one sentence, for a problem no backend could compute.
    """

    format: str
    m: int
    n: int
    k: int
    activation: str = "bf16"
    out_dtype: str = "bf16"
    groups: int = 1

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of bf16, fp4")
        if self.out_dtype not in OUT_DTYPES:
            raise ValueError(f"output dtype {self.out_dtype!r} is not one of bf16, fp16")
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, not {self.groups}")
        if self.m < 0 or self.n < 1 or self.k < 1:
            raise ValueError(f"m={self.m}, n={self.n}, k={self.k}: m must be >= 0, n and k >= 1")
        if self.k % FORMATS[self.format].block:
            raise ValueError(
                f"k={self.k} is not a multiple of {self.format}'s block of "
                f"{FORMATS[self.format].block}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The output's torch dtype, and the activation's in W4A16."""
        import torch  # takes seconds, and who reads what is stored needs none

        return torch.bfloat16 if self.out_dtype == "bf16" else torch.float16

    def at(self, m: int) -> Problem:
        """The same problem with another m."""
        return replace(self, m=m)


@dataclass(frozen=True, slots=True)
class Fp4Tensor:
    """A (rows, k) FP4 tensor in the plain layout every backend starts from.

    codes         uint8 (rows, k/2), two e2m1 codes a byte, the low nibble is the even k
    scales        uint8 (rows, k/block), the raw bits of e4m3 or e8m0, row-major (no swizzle)
    global_scale  float32 scalar (): a value is ``e2m1 * scale * global_scale``; 1 in MXFP4
    """

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def to(self, device: torch.device | str) -> Fp4Tensor:
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            global_scale=self.global_scale.to(device),
        )

    def clone(self) -> Fp4Tensor:
        return replace(
            self,
            codes=self.codes.clone(),
            scales=self.scales.clone(),
            global_scale=self.global_scale.clone(),
        )
