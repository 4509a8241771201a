"""Our layouts against FlashInfer's kernels, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fp4tune.probes import layouts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def flashinfer():
    return pytest.importorskip("flashinfer")


def scales_of(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    return torch.randint(256, (rows, cols), generator=generator, dtype=torch.uint8).cuda()


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 512])
@pytest.mark.parametrize("cols", [1, 4, 6, 64, 257])
def test_128x4_is_flashinfers_block_scale_interleave(flashinfer, rows, cols):
    scales = scales_of(rows, cols)
    theirs = flashinfer.block_scale_interleave(scales)
    assert torch.equal(layouts.swizzle_128x4(scales), theirs)


@pytest.mark.parametrize("tile", [64, 128])
def test_shuffled_codes_are_flashinfers(flashinfer, tile):
    codes = scales_of(768, 96)
    theirs = flashinfer.shuffle_matrix_a(codes, tile)
    assert torch.equal(layouts.shuffle_matrix_a(codes, tile), theirs)


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("cols", [4, 6, 48])
def test_shuffled_scales_are_flashinfers(flashinfer, tile, cols):
    scales = scales_of(768, cols)
    theirs = flashinfer.shuffle_matrix_sf_a(scales, tile).reshape(-1)
    assert torch.equal(layouts.shuffle_matrix_sf_a(scales, tile), theirs)
