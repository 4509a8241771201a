"""vLLM's ``torch.ops._C.cutlass_scaled_fp4_mm``, from its argument checks (0.11 to 0.33)."""

from __future__ import annotations

import torch

from . import numbers, places


def cutlass_scaled_fp4_mm(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_sf: torch.Tensor,
    b_sf: torch.Tensor,
    alpha: torch.Tensor,
) -> None:
    """out (m, n); a (m, k/2) and b (n, k/2) contiguous uint8; scales e4m3, padded and swizzled."""
    for x, dtype in (
        (a, torch.uint8),
        (b, torch.uint8),
        (a_sf, torch.float8_e4m3fn),
        (b_sf, torch.float8_e4m3fn),
        (alpha, torch.float32),
    ):
        if x.dtype != dtype or not x.is_contiguous():
            raise RuntimeError(f"must be contiguous and {dtype}, is {x.dtype}")
    (m, packed), n = a.shape, b.shape[0]
    cols = 2 * packed // 16
    if b.shape[1] != packed or 2 * packed % 32 or n % 32:
        raise RuntimeError("k and n must be multiples of 32")
    for sf, rows in ((a_sf, m), (b_sf, n)):
        if tuple(sf.shape) != (places.up(rows, 128), places.up(cols, 4)):
            raise RuntimeError("scales must be padded and swizzled")
    left, right = (
        numbers.scaled(
            numbers.unpack(x),
            places.tiled(places.memory(sf), x.shape[0], cols, 128),
            "nvfp4",
        )
        for x, sf in ((a, a_sf), (b, b_sf))
    )
    places.write(out, float(alpha) * (left @ right.T))
