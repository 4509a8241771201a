"""The numbers: e2m1 (OCP Microscaling Formats 1.0), e4m3 and e8m0, decoded bit by bit."""

from __future__ import annotations

import torch


def e2m1(code: int) -> float:
    """One sign bit, two exponent bits (bias 1), one mantissa bit; exponent 0 is subnormal."""
    sign = -1.0 if code >> 3 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    if exponent == 0:
        return sign * mantissa / 2
    return sign * 2.0 ** (exponent - 1) * (1 + mantissa / 2)


def e4m3(byte: int) -> float:
    """One sign bit, four exponent bits (bias 7), three mantissa bits; 0x7F and 0xFF are NaN."""
    sign = -1.0 if byte >> 7 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * 2.0 ** (exponent - 7) * (1 + mantissa / 8)


def e8m0(byte: int) -> float:
    """A power of two with bias 127; 0xFF is NaN."""
    return float("nan") if byte == 255 else 2.0 ** (byte - 127)


_E2M1 = torch.tensor([e2m1(code) for code in range(16)], dtype=torch.float64)
SCALES = {
    "nvfp4": torch.tensor([e4m3(byte) for byte in range(256)], dtype=torch.float64),
    "mxfp4": torch.tensor([e8m0(byte) for byte in range(256)], dtype=torch.float64),
}
BLOCK = {"nvfp4": 16, "mxfp4": 32}


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (rows, k/2) to float64 (rows, k): the low nibble is the even k."""
    packed = packed.to(torch.int64)
    values = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.float64)
    values[:, 0::2] = _E2M1[packed % 16]
    values[:, 1::2] = _E2M1[packed // 16]
    return values


def scaled(values: torch.Tensor, scales: torch.Tensor, fmt: str) -> torch.Tensor:
    """float64 (rows, k) times the block scales uint8 (rows, k/block)."""
    return values * SCALES[fmt][scales.to(torch.int64)].repeat_interleave(BLOCK[fmt], dim=1)
