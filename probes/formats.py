"""Numbers in FP4: e2m1 codes, e4m3 and e8m0 block scales, quantising and dequantising.

Every function runs on the device of its argument, with the same bits on a CPU and a GPU: values are
looked up or compared, never cast to an 8-bit float type, whose casts differ between torch versions.
Encodings are those of the OCP Microscaling Formats specification 1.0; e4m3 is its ``FN`` variant
(no infinities, 0x7F and 0xFF are NaN).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .problem import Format, Fp4Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""torch's dtypes of 16-bit activations and outputs."""
E2M1_MAX = 6.0
E4M3_MAX = 448.0
GSF_NUMERATOR = E2M1_MAX * E4M3_MAX
"""NVFP4's global scale factor is this over the tensor's largest magnitude."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GSF_MAX = 2.0**126


def _e4m3_value(byte: int) -> float:
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if byte & 0x80 else value


@lru_cache(maxsize=64)
def _value_table(name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The values of an encoding, by code; ``pairs`` is (256, 2) for packed bytes."""
    if name == "e4m3":
        values = [_e4m3_value(byte) for byte in range(256)]
    elif name == "e8m0":
        values = [2.0 ** (byte - 127) for byte in range(255)] + [float("nan")]
    else:
        values = [*_E2M1, *(-v for v in _E2M1)]
    table = torch.tensor(values, dtype=torch.float64)
    if name == "pairs":
        byte = torch.arange(256)
        table = torch.stack((table[byte & 15], table[byte >> 4]), dim=1)
    return table.to(dtype).to(device)


def _look_up(name: str, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    table = _value_table(name, index.device, dtype)
    found = table.index_select(0, index.reshape(-1).to(torch.int32))
    return found.reshape(*index.shape, *table.shape[1:])


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The e2m1 codes (uint8, 0 to 15, shape of x) nearest to x.

    Ties go to the code with an even mantissa bit; magnitudes above 6, infinities too, saturate; the
    sign of zero is kept. Raises ValueError for NaN, which e2m1 does not have.
    """
    if torch.isnan(x).any():
        raise ValueError("e2m1 has no NaN, and the values to encode hold one")
    return _nearest_e2m1(x)


def _nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """`encode_e2m1` of what holds no NaN; does not wait for the device."""
    size = x.abs()
    # A tie goes to the even one of two neighbours: `>` keeps the lower, `>=` takes the upper.
    code = (size > 0.25).to(torch.uint8)
    for above, tie_up in ((0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code += size >= above if tie_up else size > above
    return code + torch.signbit(x).to(torch.uint8) * 8


def decode_e2m1(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of e2m1 codes (uint8, 0 to 15), in `dtype`, same shape."""
    return _look_up("e2m1", codes, dtype)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """(rows, k) codes to (rows, k/2) bytes; the low nibble is the even k. k must be even."""
    if codes.shape[-1] % 2:
        raise ValueError(f"two codes make a byte, and the last dimension is {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """(rows, k/2) bytes to (rows, k) codes, the inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode_scale(x: torch.Tensor, fmt: Format | str) -> torch.Tensor:
    """Raw bytes (uint8, shape of x) of block scales, in the scale encoding of `fmt`.

    `fmt` is a `Format` or the name of an encoding. ``e4m3``: nearest, ties to an even mantissa,
    magnitudes above 448 saturate, NaN is 0x7F. ``e8m0``: rounded down to a power of two (the
    specification's rounding), clamped to 2**-127 .. 2**127, zero is 2**-127, NaN is 0xFF; raises
    ValueError for a negative one.
    """
    wide = x.double()
    if _encoding(fmt) == "e8m0":
        if (wide < 0).any():
            raise ValueError("e8m0 has no sign, and the scales to encode hold a negative one")
        powers = _value_table("e8m0", x.device, torch.float64)[:255]
        byte = (torch.bucketize(wide, powers, right=True) - 1).clamp(0, 254)
        return torch.where(torch.isnan(wide), 255, byte).to(torch.uint8)
    values = _value_table("e4m3", x.device, torch.float64)[:127]
    middles = (values[:-1] + values[1:]) / 2
    size = wide.abs()
    lower = torch.bucketize(size, middles)
    upper = torch.bucketize(size, middles, right=True)  # differs from `lower` at a tie only
    byte = torch.where(lower % 2 == 0, lower, upper) + torch.signbit(wide) * 128
    return torch.where(torch.isnan(wide), 127, byte).to(torch.uint8)


def decode_scale(
    raw: torch.Tensor, fmt: Format | str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values of raw scale bytes in the encoding of `fmt` (see `encode_scale`), same shape."""
    return _look_up(_encoding(fmt), raw, dtype)


def _encoding(fmt: Format | str) -> str:
    name = fmt.scale if isinstance(fmt, Format) else fmt
    if name not in ("e4m3", "e8m0"):
        raise ValueError(f"scale encoding {name!r} is not one of e4m3, e8m0")
    return name


def global_scale_for(amax: torch.Tensor) -> torch.Tensor:
    """NVFP4's fp32 global scale (the multiplier, 1/gsf) for a largest magnitude `amax` ().

    gsf = 448 * 6 / amax in fp32. It is 1 for an all-zero tensor, and at most 2**126, so that its
    inverse stays a normal number.
    """
    amax = amax.float()
    # Both operands are tensors: torch computes number / tensor as number * (1 / tensor), and on a
    # GPU tensor / number as tensor * (1 / number), which round twice.
    gsf = (torch.full_like(amax, GSF_NUMERATOR) / amax).clamp(max=_GSF_MAX)
    return torch.where(amax > 0, 1 / gsf, torch.ones_like(gsf))


def quantise(
    x: torch.Tensor, fmt: Format, global_scale: torch.Tensor | None = None, check: bool = True
) -> Fp4Tensor:
    """Quantise x (rows, k), floating and finite, to `fmt`; k is a multiple of its block.

    NVFP4: a block's scale is e4m3(amax_block / 6 / global_scale), with `global_scale` the
    multiplier stored in the result, by default from `global_scale_for`. MXFP4: 2 to the power
    floor(log2(amax_block)) - 2, as in the OCP specification (section 6.3), saturating. A block
    whose scale is zero, and a zero block, get zero codes with the signs of x; a zero MXFP4 block
    has the scale 2**-127. Everything is IEEE fp32, so a CPU and a GPU agree bit for bit.

    Raises ValueError for NaN or infinity, a k that is no multiple of the block, or a global scale
    where the format has none. Without `check` nothing is said of NaN and infinity, and NVFP4 can be
    captured in a graph: nothing waits for the device.
    """
    rows, k = x.shape
    if k % fmt.block:
        raise ValueError(f"k={k} is not a multiple of {fmt.name}'s block of {fmt.block}")
    blocks = x.float().reshape(rows, k // fmt.block, fmt.block)
    amax = blocks.abs().amax(dim=-1) if rows else blocks.new_zeros(blocks.shape[:2])
    if check and not torch.isfinite(amax).all():
        raise ValueError("only finite values can be quantised")
    if fmt.has_global:
        if global_scale is None:
            largest = amax.max() if amax.numel() else amax.new_zeros(())
            global_scale = global_scale_for(largest)
        global_scale = global_scale.float().reshape(()).to(x.device)
        largest_code = torch.full_like(global_scale, E2M1_MAX)  # a tensor: see `global_scale_for`
        scales = encode_scale(amax / largest_code / global_scale, fmt)
    else:
        if global_scale is not None:
            raise ValueError(f"{fmt.name} has no global scale")
        global_scale = torch.ones((), dtype=torch.float32, device=x.device)
        scales = encode_scale(amax.double() / 4, fmt)
    step = (decode_scale(scales, fmt) * global_scale).unsqueeze(-1)
    ratio = torch.where((step > 0) & (amax > 0).unsqueeze(-1), blocks / step, blocks * 0)
    return Fp4Tensor(fmt, pack(_nearest_e2m1(ratio).reshape(rows, k)), scales, global_scale)


def dequantise(
    t: Fp4Tensor, dtype: torch.dtype = torch.float32, with_global: bool = True
) -> torch.Tensor:
    """The (rows, k) values of `t` in `dtype`: e2m1 * scale, times the global scale if asked.

    Exact in float64. Other dtypes are computed in float32 and rounded once more: e2m1 * scale has 6
    significand bits, so without the global scale it is exact wherever the exponent fits.
    """
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    rows, k = t.shape
    values = _look_up("pairs", t.codes, inner).reshape(rows, -1, t.format.block)
    values *= decode_scale(t.scales, t.format, inner).unsqueeze(-1)
    if with_global:
        values *= t.global_scale.to(inner)
    return values.reshape(rows, k).to(dtype)
