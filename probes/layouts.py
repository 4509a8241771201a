"""Scale and weight layouts: what kernels expect of the bytes that `formats` makes.

A layout is a permutation of bytes, written here as an index map, with its inverse. Scale matrices
are (rows, columns) uint8 with one column per block along k; interleaved ones are flat and padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.nn.functional import pad

LAYOUTS = ("linear", "128x4", "8x4")

_padding: ContextVar[int] = ContextVar("padding", default=0)


@contextmanager
def padding(byte: int) -> Iterator[None]:
    """Inside, layouts made without a `fill` of their own have `byte` in their padding, not 0.

    For probing with poison there: whatever pads through this module needs not know.
    """
    before = _padding.set(byte)
    try:
        yield
    finally:
        _padding.reset(before)


def padded(rows: int, cols: int, layout: str) -> tuple[int, int]:
    """The (rows, columns) a scale matrix has in `layout` with its padding."""
    tile = {"linear": 1, "128x4": 128, "8x4": 8}[layout]
    return -(-rows // tile) * tile, cols if layout == "linear" else -(-cols // 4) * 4


def offsets(rows: int, cols: int, layout: str) -> torch.Tensor:
    """The byte offset (int64 (rows, cols)) of each scale in `layout`.

    128x4: ``((r//128)*ceil(cols/4) + c//4)*512 + (r%32)*16 + ((r%128)//32)*4 + c%4``, the scale
    factor layout of cuBLAS and CUTLASS; 8x4: ``((r//8)*ceil(cols/4) + c//4)*32 + (r%8)*4 + c%4``,
    the small-m layout of TensorRT-LLM.
    """
    r = torch.arange(rows).unsqueeze(1)
    c = torch.arange(cols).unsqueeze(0)
    if layout == "linear":
        return r * cols + c
    tiles = -(-cols // 4)
    if layout == "8x4":
        return (r // 8 * tiles + c // 4) * 32 + r % 8 * 4 + c % 4
    if layout == "128x4":
        return (r // 128 * tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    raise ValueError(f"scale layout {layout!r} is not one of {', '.join(LAYOUTS)}")


def _tiles(scales: torch.Tensor, layout: str, fill: int | None) -> torch.Tensor:
    fill = _padding.get() if fill is None else fill
    rows, cols = scales.shape
    all_rows, all_cols = padded(rows, cols, layout)
    return pad(scales, (0, all_cols - cols, 0, all_rows - rows), value=fill)


def swizzle_128x4(scales: torch.Tensor, fill: int | None = None) -> torch.Tensor:
    """(rows, cols) scale bytes to the flat 128x4 layout; padding holds `fill` (see `padding`)."""
    whole = _tiles(scales, "128x4", fill)
    return whole.reshape(-1, 4, 32, whole.shape[1] // 4, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle_128x4(flat: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The (rows, cols) scale bytes of a flat 128x4 buffer; the padding is dropped."""
    all_rows, all_cols = padded(rows, cols, "128x4")
    _check_size(flat, all_rows * all_cols)
    tiles = flat.reshape(all_rows // 128, all_cols // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(all_rows, all_cols)[:rows, :cols].contiguous()


def swizzle_8x4(scales: torch.Tensor, fill: int | None = None) -> torch.Tensor:
    """(rows, cols) scale bytes to the flat 8x4 layout; padding holds `fill` (see `padding`)."""
    whole = _tiles(scales, "8x4", fill)
    return whole.reshape(-1, 8, whole.shape[1] // 4, 4).permute(0, 2, 1, 3).reshape(-1)


def unswizzle_8x4(flat: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The (rows, cols) scale bytes of a flat 8x4 buffer; the padding is dropped."""
    all_rows, all_cols = padded(rows, cols, "8x4")
    _check_size(flat, all_rows * all_cols)
    tiles = flat.reshape(all_rows // 8, all_cols // 4, 8, 4)
    return tiles.permute(0, 2, 1, 3).reshape(all_rows, all_cols)[:rows, :cols].contiguous()


def swizzle(scales: torch.Tensor, layout: str, fill: int | None = None) -> torch.Tensor:
    """(rows, cols) scale bytes to a flat buffer in `layout`, one of `LAYOUTS`."""
    if layout == "linear":
        return scales.reshape(-1)
    if layout not in LAYOUTS:
        raise ValueError(f"scale layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    return (swizzle_128x4 if layout == "128x4" else swizzle_8x4)(scales, fill)


def unswizzle(flat: torch.Tensor, rows: int, cols: int, layout: str) -> torch.Tensor:
    """The inverse of `swizzle`, without the padding."""
    if layout == "linear":
        _check_size(flat, rows * cols)
        return flat.reshape(rows, cols)
    if layout not in LAYOUTS:
        raise ValueError(f"scale layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    return (unswizzle_128x4 if layout == "128x4" else unswizzle_8x4)(flat, rows, cols)


def _check_size(flat: torch.Tensor, size: int) -> None:
    if flat.numel() != size:
        raise ValueError(f"the layout has {size} bytes, the buffer {flat.numel()}")


def shuffle_rows(rows: int, epilogue_tile_m: int = 128) -> torch.Tensor:
    """int64 (rows,): the source row of each row of a weight shuffled for TRT-LLM's kernels.

    In blocks of B = 32 rows (16 where the epilogue tile is no multiple of 128), source row
    ``(B/8)*i + c`` goes to row ``8*c + i``: the block, seen as (8, B/8), is transposed. This is
    FlashInfer's ``shuffle_matrix_a``. Raises ValueError where blocks do not divide the rows.
    """
    block = 32 if epilogue_tile_m % 128 == 0 else 16
    if rows % block:
        raise ValueError(f"{rows} rows are not a multiple of the shuffle block of {block}")
    return torch.arange(rows).reshape(-1, 8, block // 8).transpose(1, 2).reshape(-1)


def unshuffle_rows(rows: int, epilogue_tile_m: int = 128) -> torch.Tensor:
    """The inverse permutation of `shuffle_rows`."""
    block = 32 if epilogue_tile_m % 128 == 0 else 16
    if rows % block:
        raise ValueError(f"{rows} rows are not a multiple of the shuffle block of {block}")
    return torch.arange(rows).reshape(-1, block // 8, 8).transpose(1, 2).reshape(-1)


def shuffle_matrix_a(codes: torch.Tensor, epilogue_tile_m: int = 128) -> torch.Tensor:
    """(rows, bytes) weight codes with rows in TRT-LLM's order."""
    return codes[shuffle_rows(codes.shape[0], epilogue_tile_m).to(codes.device)]


def unshuffle_matrix_a(codes: torch.Tensor, epilogue_tile_m: int = 128) -> torch.Tensor:
    """The inverse of `shuffle_matrix_a`."""
    return codes[unshuffle_rows(codes.shape[0], epilogue_tile_m).to(codes.device)]


def shuffle_matrix_sf_a(
    scales: torch.Tensor, epilogue_tile_m: int = 128, fill: int | None = None
) -> torch.Tensor:
    """(rows, cols) linear scales to the flat buffer TRT-LLM's kernels read: shuffled, then 128x4.

    Raises ValueError unless rows is a multiple of 128.
    """
    if scales.shape[0] % 128:
        raise ValueError(f"{scales.shape[0]} rows of scales are not a multiple of 128")
    return swizzle_128x4(shuffle_matrix_a(scales, epilogue_tile_m), fill)


def unshuffle_matrix_sf_a(
    flat: torch.Tensor, rows: int, cols: int, epilogue_tile_m: int = 128
) -> torch.Tensor:
    """The inverse of `shuffle_matrix_sf_a`: (rows, cols) linear scales."""
    return unshuffle_matrix_a(unswizzle_128x4(flat, rows, cols), epilogue_tile_m)
