"""Layouts are permutations: each has an inverse, and agrees with its formula byte for byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import layouts

SIZES = (st.integers(1, 300), st.integers(1, 19), st.integers(0, 255))


def scales_of(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    return torch.randint(256, (rows, cols), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@settings(deadline=None, max_examples=60)
@given(*SIZES)
def test_unswizzling_undoes_swizzling_for_any_shape(layout, rows, cols, fill):
    scales = scales_of(rows, cols)
    flat = layouts.swizzle(scales, layout, fill)
    assert flat.dim() == 1 and flat.is_contiguous()
    assert torch.equal(layouts.unswizzle(flat, rows, cols, layout), scales)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@settings(deadline=None, max_examples=60)
@given(*SIZES)
def test_each_scale_lies_at_its_offset_and_everything_else_is_the_fill_byte(
    layout, rows, cols, fill
):
    scales = scales_of(rows, cols)
    flat = layouts.swizzle(scales, layout, fill)
    all_rows, all_cols = layouts.padded(rows, cols, layout)
    expected = torch.full((all_rows * all_cols,), fill, dtype=torch.uint8)
    expected[layouts.offsets(rows, cols, layout).reshape(-1)] = scales.reshape(-1)
    assert torch.equal(flat, expected)


def test_known_offsets():
    # ((200//128)*2 + 5//4)*512 + (200%32)*16 + ((200%128)//32)*4 + 5%4
    assert layouts.offsets(256, 8, "128x4")[200, 5] == (2 + 1) * 512 + 8 * 16 + 2 * 4 + 1
    # ((13//8)*2 + 5//4)*32 + (13%8)*4 + 5%4
    assert layouts.offsets(16, 8, "8x4")[13, 5] == (2 + 1) * 32 + 5 * 4 + 1


@pytest.mark.parametrize("tile", [64, 128, 192, 256])
@given(st.integers(0, 12))
def test_unshuffling_undoes_shuffling(tile, blocks):
    rows = 32 * blocks
    matrix = torch.arange(rows).unsqueeze(1) * torch.ones(1, 3, dtype=torch.int64)
    shuffled = layouts.shuffle_matrix_a(matrix, tile)
    assert torch.equal(layouts.unshuffle_matrix_a(shuffled, tile), matrix)
    assert sorted(layouts.shuffle_rows(rows, tile).tolist()) == list(range(rows))


def test_neighbours_in_a_shuffled_block_are_four_or_two_rows_apart():
    assert layouts.shuffle_rows(32, 128)[:9].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 1]
    assert layouts.shuffle_rows(16, 64)[:9].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1]


@pytest.mark.parametrize("tile", [64, 128])
def test_shuffled_rows_agree_with_flashinfers_index_map(tile):
    utils = pytest.importorskip("flashinfer.utils")
    matrix = torch.zeros(384, 8, dtype=torch.uint8)
    theirs = utils.get_shuffle_matrix_a_row_indices(matrix, tile)
    assert torch.equal(layouts.shuffle_rows(384, tile), theirs)
    theirs = utils.get_shuffle_matrix_sf_a_row_indices(matrix, tile)
    assert torch.equal(layouts.shuffle_rows(384, tile), theirs)


@given(st.integers(1, 3), st.integers(1, 9))
def test_shuffled_scales_come_back(tiles, cols):
    scales = scales_of(128 * tiles, cols)
    flat = layouts.shuffle_matrix_sf_a(scales, fill=0x7F)
    assert torch.equal(layouts.unshuffle_matrix_sf_a(flat, 128 * tiles, cols), scales)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 128"):
        layouts.shuffle_matrix_sf_a(scales_of(64, 4))
    with pytest.raises(ValueError, match="shuffle block of 32"):
        layouts.shuffle_rows(48, 128)
    with pytest.raises(ValueError, match="shuffle block of 16"):
        layouts.unshuffle_rows(40, 64)
    with pytest.raises(ValueError, match="512 bytes"):
        layouts.unswizzle_128x4(torch.zeros(511, dtype=torch.uint8), 1, 1)
    for call in (
        lambda: layouts.swizzle(scales_of(1, 1), "4x4"),
        lambda: layouts.offsets(1, 1, "4x4"),
    ):
        with pytest.raises(ValueError, match="4x4"):
            call()
