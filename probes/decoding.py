"""How the floors decode FP4: by tables of their own, and not as the reference does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .problem import Format, Fp4Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1_table() -> torch.Tensor:
    """The value of each 4-bit code: float32 (16,); bit 3 is the sign, code 8 is -0."""
    return torch.tensor(E2M1 + tuple(-v for v in E2M1))


def scale_table(fmt: Format) -> torch.Tensor:
    """The value of each scale byte: float32 (256,), NaN where the encoding says NaN."""
    raw = torch.arange(256, dtype=torch.uint8)
    if fmt.scale == "e4m3":
        return raw.view(torch.float8_e4m3fn).float()
    exponents = raw.to(torch.float64) - 127
    return torch.where(raw == 255, torch.nan, torch.exp2(exponents)).float()


@cache
def _tables(fmt: Format, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tables of a `Decoder`, on the CPU: they are the same for every weight."""
    values = e2m1_table()
    byte = torch.arange(256)
    both = torch.stack((values[byte & 15], values[byte >> 4]), dim=1).to(dtype)
    wide = torch.int64 if dtype == torch.float32 else torch.int32
    return both.contiguous().view(wide).flatten(), scale_table(fmt).to(dtype)


@cache
def _tables_on(
    fmt: Format, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    pairs, scales = _tables(fmt, dtype)
    return pairs.to(device), scales.to(device)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Look-up tables that turn packed FP4 into `dtype`, on one device.

    pairs   one element for each byte, wide enough for its two values (low nibble first)
    scales  (256,) in `dtype`
    """

    dtype: torch.dtype
    pairs: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, fmt: Format, dtype: torch.dtype, device: torch.device) -> Decoder:
        """One of a process, made once: a copy to a GPU waits for whatever it has to do."""
        return cls(dtype, *_tables_on(fmt, dtype, device))

    def __call__(self, t: Fp4Tensor) -> torch.Tensor:
        """``e2m1 * scale`` as (rows, k) in this dtype, without the global scale."""
        rows, k = t.shape
        # An index_select of one wide element a byte is several times faster than indexing pairs.
        values = self.pairs.index_select(0, t.codes.reshape(-1).int()).view(self.dtype)
        scales = self.scales.index_select(0, t.scales.reshape(-1).int())
        return values.view(-1, t.format.block).mul_(scales.view(-1, 1)).view(rows, k)
