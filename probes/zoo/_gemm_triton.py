"""The zoo's own GEMM: plain on purpose, with each fault a switch. SM90 and newer for PDL."""

# Triton reads annotations of kernels, so no postponed evaluation here.
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer


@triton.jit
def _e2m1(code):
    """Codes 0..15 to float32."""
    size = (code & 7).to(tl.float32)
    value = tl.where(size < 4, 0.5 * size, tl.where(size < 6, size - 2, 2 * size - 8))
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def _e4m3(byte):
    """Scale bytes to float32; NaN becomes NaN."""
    bits = byte.to(tl.int32)
    size = bits & 127
    normal = ((size + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 127, float("nan"), value)
    return tl.where(bits > 127, -value, value)


@triton.jit
def _weight_bytes(codes, scales, col, n, k, first, HALF: tl.constexpr):
    """Bytes of codes (HALF, BN) from byte `first` of each row, and the scale byte of each."""
    byte = (first + tl.arange(0, HALF))[:, None]
    there = (byte < k // 2) & (col < n)
    code = tl.load(codes + col * (k // 2) + byte, mask=there, other=0)
    return code, tl.load(scales + col * (k // 16) + byte // 8, mask=there, other=0)


@triton.jit
def _row_scales(a_scales, row, stride, m, k, first, HALF: tl.constexpr):
    byte = (first + tl.arange(0, HALF))[None, :]
    there = (row < m) & (byte < k // 2)
    return tl.load(a_scales + row * stride + byte // 8, mask=there, other=0)


@triton.jit(do_not_specialize=["m", "rarely"])
def gemm(
    a,  # 16-bit floats (m, k), or codes uint8 (m, k / 2)
    a_scales,  # uint8 (m, k / 16); not read for 16-bit activations
    a_alpha,  # float32 (1,)
    codes,  # uint8 (n, k / 2)
    scales,  # uint8 (n, k / 16)
    alpha,  # float32 (1,)
    out,  # (m, n)
    m,
    n,
    k,
    stride,  # elements from one row of `a` to the next
    scale_stride,  # bytes from one row of `a_scales` to the next
    rarely,  # with a clock: drop a tile once in so many launches
    WHEN: tl.constexpr,
    FP4: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
):
    """``out = alpha * a @ weight.T`` for NVFP4. `WHEN` says when it waits for the kernel before:

    first     before anything else (right)
    weights   after it has loaded weights, which no kernel before it writes (right)
    scales    after it has loaded the activation's block scales, too
    some      in every second block only
    zeroed    after it has stored zeros into the output
    last      after it has stored the output
    never     not at all

    `DROP`: ``tail`` skips a last tile that is not full, ``clock`` one tile in `rarely` launches.
    """
    where = tl.program_id(0) + tl.program_id(1)
    if WHEN == "first":
        gdc_wait()
    if WHEN == "some" and where % 2 == 1:
        gdc_wait()
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row, col = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    place = out + row * n + col
    inside = (row < m) & (col < n)
    if WHEN == "zeroed":
        tl.store(place, tl.zeros((BM, BN), out.dtype.element_ty), mask=inside)
        gdc_wait()
    code, raw = _weight_bytes(codes, scales, col, n, k, 0, HALF)
    if WHEN == "weights":
        gdc_wait()
    if FP4:
        row_raw = _row_scales(a_scales, row, scale_stride, m, k, 0, HALF)
    if WHEN == "scales":
        gdc_wait()
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, k // 2, HALF):
        byte = (first + tl.arange(0, HALF))[None, :]
        there = (row < m) & (byte < k // 2)
        if FP4:
            both = tl.load(a + row * stride + byte, mask=there, other=0)
            row_scale = _e4m3(row_raw)
            even = (_e2m1(both & 15) * row_scale).to(out.dtype.element_ty)
            odd = (_e2m1(both >> 4) * row_scale).to(out.dtype.element_ty)
            row_raw = _row_scales(a_scales, row, scale_stride, m, k, first + HALF, HALF)
        else:
            even = tl.load(a + row * stride + 2 * byte, mask=there, other=0)
            odd = tl.load(a + row * stride + 2 * byte + 1, mask=there, other=0)
        scale = _e4m3(raw)
        # A code times its scale has 6 significand bits: exact in bf16 and fp16.
        acc = tl.dot(even, (_e2m1(code & 15) * scale).to(even.dtype), acc)
        acc = tl.dot(odd, (_e2m1(code >> 4) * scale).to(even.dtype), acc)
        code, raw = _weight_bytes(codes, scales, col, n, k, first + HALF, HALF)
    factor = tl.load(alpha)
    if FP4:
        factor *= tl.load(a_alpha)
    acc *= factor
    if DROP == "tail":
        inside = inside & (rows[:, None] // BM < m // BM)
    if DROP == "clock" and where == 0:
        # One tile of a launch looks at the clock; its last bits are as good as random.
        inside = inside & ((globaltimer() // 32) % rarely != 0)
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside)
    if WHEN == "last":
        gdc_wait()


@triton.jit(do_not_specialize=["size"])
def zero(out, size, BLOCK: tl.constexpr):
    """Store zeros, and let the next kernel begin before that; itself it waits as it should."""
    gdc_launch_dependents()
    gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=at < size)
