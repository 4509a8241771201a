"""The zoo's own NVFP4 quantiser: plain on purpose, with its wait a switch. SM90 and newer."""

# Triton reads annotations of kernels, so no postponed evaluation here.
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _nearest_code(x):
    """The e2m1 code nearest to x, saturating; a tie goes to the even code."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return tl.where(x < 0, code + 8, code)


@triton.jit(do_not_specialize=["blocks"])
def quantise(
    x,  # 16-bit floats, blocks of 16 in a row
    codes,  # uint8, 8 a block
    scales,  # uint8, the bits of e4m3
    global_scale,  # float32 (1,)
    blocks,
    WAIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantise `blocks` blocks. It lets the next kernel begin before it has stored anything."""
    gdc_launch_dependents()
    if WAIT:
        gdc_wait()
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = block < blocks
    pair = tl.arange(0, 8)[None, :]
    at = x + block[:, None] * 16 + 2 * pair
    even = tl.load(at, mask=inside[:, None], other=0).to(tl.float32)
    odd = tl.load(at + 1, mask=inside[:, None], other=0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=1)
    factor = tl.load(global_scale)
    scale = tl.minimum(largest / 6 / factor, 448.0).to(tl.float8e4nv)
    step = scale.to(tl.float32)[:, None] * factor
    low = _nearest_code(tl.where(step > 0, even / step, 0.0))
    high = _nearest_code(tl.where(step > 0, odd / step, 0.0))
    both = (low | (high << 4)).to(tl.uint8)
    tl.store(codes + block[:, None] * 8 + pair, both, mask=inside[:, None])
    tl.store(scales + block, scale.to(tl.uint8, bitcast=True), mask=inside)
