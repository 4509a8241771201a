"""A split-k GEMM, its workspace and its locks, and kernels that never end or write anywhere."""

# Triton reads annotations of kernels, so no postponed evaluation here.
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from ._gemm_triton import _e2m1, _e4m3, _weight_bytes


@triton.jit
def _partial_product(
    a, codes, scales, row, col, m, n, k, stride, begin, end, BM, BN, HALF: tl.constexpr
):
    """The product of bytes `begin` to `end` along k: float32 (BM, BN), without the global scale."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(begin, end, HALF):
        byte = (first + tl.arange(0, HALF))[None, :]
        there = (row < m) & (byte < k // 2)
        even = tl.load(a + row * stride + 2 * byte, mask=there, other=0)
        odd = tl.load(a + row * stride + 2 * byte + 1, mask=there, other=0)
        code, raw = _weight_bytes(codes, scales, col, n, k, first, HALF)
        scale = _e4m3(raw)
        acc = tl.dot(even, (_e2m1(code & 15) * scale).to(even.dtype), acc)
        acc = tl.dot(odd, (_e2m1(code >> 4) * scale).to(even.dtype), acc)
    return acc


@triton.jit(do_not_specialize=["m"])
def accumulate(
    a,  # 16-bit floats (m, k)
    codes,  # uint8 (n, k / 2)
    scales,  # uint8 (n, k / 16)
    sums,  # float32 (m, n), zeros
    m,
    n,
    k,
    stride,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
):
    """Add the part of ``a @ weight.T`` of each split to `sums`, in whatever order they come."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row, col = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    share = tl.cdiv(tl.cdiv(k // 2, HALF), SPLITS) * HALF
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, k // 2)
    acc = _partial_product(a, codes, scales, row, col, m, n, k, stride, begin, end, BM, BN, HALF)
    tl.atomic_add(sums + row * n + col, acc, mask=(row < m) & (col < n))


@triton.jit(do_not_specialize=["size"])
def scale_down(sums, alpha, out, size, BLOCK: tl.constexpr):
    """``out = alpha * sums``, in the output's dtype."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(sums + at, mask=at < size, other=0.0) * tl.load(alpha)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["m", "hold"])
def in_turn(
    a,
    codes,
    scales,
    alpha,
    sums,  # float32 (m, n)
    locks,  # int32, one a tile: which split comes next; all zero between launches
    out,
    m,
    n,
    k,
    stride,
    hold,  # nanoseconds a turn takes at least
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
):
    """Split-k with a lock a tile: a split waits for its turn and gives it to the next.

    Right for one launch at a time. Of two that share the locks both can take the first turn, and
    then the second is over before anyone had it.
    """
    tile = tl.program_id(0)
    across = tl.cdiv(n, BN)
    split = tl.program_id(1)
    rows = tile // across * BM + tl.arange(0, BM)
    cols = tile % across * BN + tl.arange(0, BN)
    row, col = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    inside = (row < m) & (col < n)
    place = sums + row * n + col
    turn = tl.atomic_add(locks + tile, 0)
    while turn != split:
        turn = tl.atomic_add(locks + tile, 0)
    begin_ns = globaltimer()
    share = tl.cdiv(tl.cdiv(k // 2, HALF), SPLITS) * HALF
    begin = split * share
    end = tl.minimum(begin + share, k // 2)
    acc = _partial_product(a, codes, scales, row, col, m, n, k, stride, begin, end, BM, BN, HALF)
    if split > 0:
        # Past the first-level cache: another SM wrote this.
        acc += tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
    if split < SPLITS - 1:
        tl.store(place, acc, mask=inside)
    else:
        tl.store(out + row * n + col, (acc * tl.load(alpha)).to(out.dtype.element_ty), mask=inside)
    while globaltimer() - begin_ns < hold:
        pass
    tl.debug_barrier()
    if split < SPLITS - 1:
        tl.atomic_add(locks + tile, 1)
    else:
        tl.atomic_xchg(locks + tile, 0)


@triton.jit
def wait_forever(flag):  # int32 (1,), which nobody sets
    seen = tl.atomic_add(flag, 0)
    while seen == 0:
        seen = tl.atomic_add(flag, 0)


@triton.jit(do_not_specialize=["address"])
def write_anywhere(address):  # an integer that is no address of anything
    tl.store(address.to(tl.int64).to(tl.pointer_type(tl.int32)), 1)
