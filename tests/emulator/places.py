"""Where scale factors and rows lie in memory, written element by element.

128x4: cuBLAS documentation, "1D Block Scaling Factors Layout": tiles of 128 rows by 4 columns, 512
bytes each, row-major; inside a tile the scale of (outer, inner) is at
``(outer % 32) * 16 + (outer / 32) * 4 + inner``. 8x4: FlashInfer's ``SfLayout.layout_8x4``: tiles
of 8 rows by 4 columns, row-major inside and among themselves. Shuffled: FlashInfer's
``shuffle_matrix_a``, which tells where each row of a block of 32 goes.
"""

from __future__ import annotations

import functools

import torch

WHERE_ROWS_GO = (
    *(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27),
    *(4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31),
)


def up(x: int, step: int) -> int:
    return (x + step - 1) // step * step


def tiled(memory: torch.Tensor, rows: int, cols: int, tile_rows: int) -> torch.Tensor:
    """The (rows, cols) scales in a flat buffer of 128x4 or 8x4 tiles.

    Raises ValueError where the buffer is not the padded size: a kernel would read past it.
    """
    size = up(rows, tile_rows) * up(cols, 4)
    if memory.numel() != size:
        raise ValueError(f"{memory.numel()} scales where the padded layout has {size}")
    return memory[_offsets(rows, cols, tile_rows)]


@functools.cache
def _offsets(rows: int, cols: int, tile_rows: int) -> torch.Tensor:
    """int64 (rows, cols): where each scale lies."""
    tiles_across = up(cols, 4) // 4
    found = torch.empty(rows, cols, dtype=torch.int64)
    for outer in range(rows):
        inside = outer % tile_rows
        start = inside % 32 * 16 + inside // 32 * 4 if tile_rows == 128 else inside * 4
        base = outer // tile_rows * tiles_across * tile_rows * 4 + start
        found[outer] = torch.tensor([base + c // 4 * tile_rows * 4 + c % 4 for c in range(cols)])
    return found


def unshuffled(rows: torch.Tensor) -> torch.Tensor:
    """A shuffled matrix with its rows where they were. Raises ValueError for ragged blocks."""
    if rows.shape[0] % 32:
        raise ValueError("a shuffled matrix has whole blocks of 32 rows")
    found = torch.empty_like(rows)
    for row in range(rows.shape[0]):
        found[row] = rows[row // 32 * 32 + WHERE_ROWS_GO[row % 32]]
    return found


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes a kernel sees at a tensor's address, in order, whatever its strides say."""
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)


def write(out: torch.Tensor, exact: torch.Tensor) -> None:
    """Round float64 to the output dtype once, through float32 as accumulators are."""
    out.copy_(exact.to(torch.float32).to(out.dtype))
