"""Triton kernels of `triton-w4a16`: FP4 weights times 16-bit activations, fp32 accumulation.

In plain words: a block of threads owns a tile of the output. It walks along k, 128 columns at a
time; for each step it fetches the activations as they are (into shared memory) and the weights as
4-bit codes (four times fewer bytes than bf16, which is why a small m gets faster), turns the codes
into 16-bit floats in registers, and gives both to the tensor cores, which add in fp32.

**The weight is the left operand.** The kernel computes ``out.T = W @ A.T``, not ``A @ W.T``: wgmma
(and mma.sync) take their *left* operand from registers, so a weight goes from memory to the tensor
core without a round trip of its dequantised form through shared memory; and a small m then lies on
the instruction's right-hand side, which may be as narrow as 8, where the left must be 64 tall.
(Triton 3.2 to 3.9 does this with wgmma, on SM90. Where it uses mma.sync, it still passes the
dequantised weights through shared memory, to share them among warps: right, and slower.)

**The packed weight** (made by `pack` in `triton_w4a16`) is cut in k-tiles of 128; in one tile each
row has 16 int32 words, 64 bytes. In the fragment of a 16-bit MMA, lane ``t`` of a row's four lanes
holds, of each 16 columns, columns ``2t, 2t+1, 2t+8, 2t+9``. Word ``(t, j)`` holds just those of
columns ``32j..32j+31``, so that lane t's four words are 16 consecutive bytes and nothing moves
between lanes. Inside the word, each of the four register halves (g, h) = (16-column group, 8-column
half) has its two codes (p = 0, 1) at the same place in the two 16-bit lanes, at bits chosen so that
shifts and masks put sign, exponent and mantissa where the 16-bit float wants them (`BITS`; 11
integer instructions for 8 weights). As a float they read ``value * 2**-126`` (bf16) or
``value * 2**-14`` (fp16), subnormals included, and a multiplication makes up for the factor
exactly.

**Scales.** NVFP4's e4m3 scales (-9 <= exponent <= 8 when subnormals are normalised) are re-encoded
as bytes of 5 exponent bits biased by 22 and 3 mantissa bits. One multiply-add or shift turns the
byte into ``scale * 2**119`` (bf16) or ``scale * 2**7`` (fp16), so the dequantised weight is
``value * scale * 2**-7``: at most 6 significant bits, within range, exact in both types. MXFP4's
e8m0 bytes are used as they are: ``value * 2**-4 * 2**(byte - 127)`` is exact in bf16 for every
byte (down to subnormals), and does not fit fp16.

**Exactness.** So every product is exact and only three things round: the fp32 sums, the one
multiplication by ``2**7 * global scale`` (or ``2**4``) in fp32, and the conversion to the output.
With split-K the partial sums are fp32 as well and are added in a fixed order: the same inputs give
the same bits in every run.

**One step at a time.** A wgmma still in flight reads its left operand from registers. Triton
(3.6 and 3.9, at least) lets the last ones of a step run on while the next step's weights are
already decoded into the same registers: right while the tensor cores are idle, wrong in single
tiles as soon as another kernel shares the multiprocessor. So the sum passes through an empty
instruction that Triton must wait for (`wgmma.wait_group 0`); tests look for it in the PTX.

**Activations** come through pointers with a mask or, where `TMA` is set, through a tensor
descriptor: the copy engine then does the addressing and fills rows past m with zeros, which takes
a third of the instructions out of the loop of a large tile (459 to 303, SM90, 128 x 256).
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE_K = 128
"""Columns in one k-tile of the packed weight."""

# Bits (sign, e1, e0, m) in a 16-bit lane of register (g, h) = 0..3, and how the float gets them:
# each is a list of (shift, mask): positive shifts right, negative left; the parts are or-ed.
BITS = {
    "bf16": ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 11, 10)),
    "fp16": ((15, 11, 10, 9), (12, 8, 7, 6), (14, 5, 4, 3), (13, 2, 1, 0)),
}
FLOAT_BITS = {"bf16": (15, 8, 7, 6), "fp16": (15, 11, 10, 9)}


def _decode_asm(dtype: str) -> str:
    """PTX that turns word $8 into registers q0..q3, two unscaled 16-bit floats in each."""
    lines = []
    for r, bits in enumerate(BITS[dtype]):
        parts: dict[int, int] = {}
        for at, to in zip(bits, FLOAT_BITS[dtype], strict=True):
            parts[to - at] = parts.get(to - at, 0) | (0x00010001 << to)
        for i, (left, mask) in enumerate(sorted(parts.items(), key=lambda x: -x[0])):
            source = "$8"
            if left:
                op = f"shl.b32 t, $8, {left};" if left > 0 else f"shr.u32 t, $8, {-left};"
                lines.append(op)
                source = "t"
            if i == 0:
                lines.append(f"and.b32 q{r}, {source}, 0x{mask:08x};")
            else:  # (source & mask) | q in one LOP3
                lines.append(f"lop3.b32 q{r}, {source}, 0x{mask:08x}, q{r}, 0xEA;")
    return "\n".join(lines)


_UNPACK = "\n".join(f"mov.b32 {{${2 * r}, ${2 * r + 1}}}, q{r};" for r in range(4))


def _mul(dtype: str, r: int, factor: str) -> str:
    # bf16 has no mul before SM90; a fused add of -0.0 changes nothing, not even the sign of 0.
    if dtype == "bf16":
        return f"fma.rn.bf16x2 q{r}, q{r}, {factor}, z;"
    return f"mul.rn.f16x2 q{r}, q{r}, {factor};"


def _nvfp4_asm(dtype: str) -> str:
    # $9: two scale bytes, of the word's first and second 16 columns.
    widen = "mad.lo.u32 {s}, {s}, 16, 0x70007000;" if dtype == "bf16" else "shl.b32 {s}, {s}, 7;"
    return "\n".join(
        [
            "{ .reg .b32 t, z, s0, s1, q0, q1, q2, q3;",
            "mov.b32 z, 0x80008000;" if dtype == "bf16" else "",
            "prmt.b32 s0, $9, 0, 0x4040;",
            "prmt.b32 s1, $9, 0, 0x4141;",
            widen.format(s="s0"),
            widen.format(s="s1"),
            _decode_asm(dtype),
            *(_mul(dtype, r, f"s{r // 2}") for r in range(4)),
            _UNPACK,
            "}",
        ]
    )


def _mxfp4_asm() -> str:
    # $9: the scale 2**(byte - 127) as bf16 bits. 0x7C80 is 2**122.
    return "\n".join(
        [
            "{ .reg .b32 t, z, s, c, q0, q1, q2, q3;",
            "mov.b32 z, 0x80008000;",
            "mov.b32 c, 0x7C807C80;",
            "prmt.b32 s, $9, 0, 0x1010;",
            _decode_asm("bf16"),
            *(_mul("bf16", r, "c") for r in range(4)),
            *(_mul("bf16", r, "s") for r in range(4)),
            _UNPACK,
            "}",
        ]
    )


_ASM_NV_BF16 = tl.constexpr(_nvfp4_asm("bf16"))
_ASM_NV_FP16 = tl.constexpr(_nvfp4_asm("fp16"))
_ASM_MX_BF16 = tl.constexpr(_mxfp4_asm())
_CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")
_BF16_TYPES = tl.constexpr((tl.bfloat16,) * 8)
_FP16_TYPES = tl.constexpr((tl.float16,) * 8)


@triton.jit
def _mxfp4_scale(byte):
    """2**(byte - 127) as the bits of a bf16: byte 0 is a subnormal, byte 255 is NaN."""
    e = byte.to(tl.int32)
    return (e << 7) | tl.where((e == 0) | (e == 255), 0x40, 0)


@triton.jit
def _code_at(word, S: tl.constexpr, E1: tl.constexpr, E0: tl.constexpr, M: tl.constexpr):
    """Value of the code whose bits are at these places of `word`, as fp32 (no inline PTX)."""
    m = (word >> M) & 1
    e = ((word >> E0) & 1) | (((word >> E1) & 1) << 1)
    half = tl.where(e == 0, m, (2 + m) << tl.where(e == 0, 0, e - 1))
    value = half.to(tl.float32) * 0.5
    return tl.where(((word >> S) & 1) != 0, -value, value)


@triton.jit
def _plain_dequantise(word, scale, MX: tl.constexpr, BF16: tl.constexpr):
    """What the inline PTX does, in plain Triton: for the interpreter, and as its specification."""
    if MX:
        bits = _mxfp4_scale(scale)
        s0 = (bits << 16).to(tl.float32, bitcast=True) * 0.0625
        s1 = s0
    else:
        both = scale.to(tl.int32) & 0xFFFF
        # E5M3, bias 22, then the factor 2**-7: as fp32 bits, (byte << 20) + ((127 - 29) << 23).
        s0 = (((both & 0xFF) << 20) + (98 << 23)).to(tl.float32, bitcast=True)
        s1 = (((both >> 8) << 20) + (98 << 23)).to(tl.float32, bitcast=True)
    if BF16:
        a0 = _code_at(word, 15, 8, 7, 6) * s0
        a1 = _code_at(word, 31, 24, 23, 22) * s0
        b0 = _code_at(word, 12, 5, 4, 3) * s0
        b1 = _code_at(word, 28, 21, 20, 19) * s0
        c0 = _code_at(word, 9, 2, 1, 0) * s1
        c1 = _code_at(word, 25, 18, 17, 16) * s1
        d0 = _code_at(word, 14, 13, 11, 10) * s1
        d1 = _code_at(word, 30, 29, 27, 26) * s1
    else:
        a0 = _code_at(word, 15, 11, 10, 9) * s0
        a1 = _code_at(word, 31, 27, 26, 25) * s0
        b0 = _code_at(word, 12, 8, 7, 6) * s0
        b1 = _code_at(word, 28, 24, 23, 22) * s0
        c0 = _code_at(word, 14, 5, 4, 3) * s1
        c1 = _code_at(word, 30, 21, 20, 19) * s1
        d0 = _code_at(word, 13, 2, 1, 0) * s1
        d1 = _code_at(word, 29, 18, 17, 16) * s1
    return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit
def _dequantise(word, scale, MX: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """word (R, J, 4) and its scales, the same shape -> weights (R, 32 * J), times 2**-7 or 2**-4.

    scale: int16, two E5M3 bytes (NVFP4); uint8, one e8m0 byte (MXFP4).
    """
    if PTX:
        if MX:
            a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
                _ASM_MX_BF16, _CONSTRAINTS, [word, _mxfp4_scale(scale)], _BF16_TYPES, True, 1
            )
        elif BF16:
            a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
                _ASM_NV_BF16, _CONSTRAINTS, [word, scale.to(tl.int32)], _BF16_TYPES, True, 1
            )
        else:
            a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
                _ASM_NV_FP16, _CONSTRAINTS, [word, scale.to(tl.int32)], _FP16_TYPES, True, 1
            )
    else:
        a0, a1, b0, b1, c0, c1, d0, d1 = _plain_dequantise(word, scale, MX, BF16)
    # (R, J, t) each -> (R, J, t, p, h, g) -> (R, J, g, h, t, p): columns 32j + 16g + 8h + 2t + p.
    low = tl.join(tl.join(a0, a1), tl.join(b0, b1))
    high = tl.join(tl.join(c0, c1), tl.join(d0, d1))
    w = tl.permute(tl.join(low, high), (0, 1, 5, 4, 2, 3))
    return tl.reshape(w, (word.shape[0], word.shape[1] * 32))


@triton.jit(do_not_specialize=["m", "tiles_k"])
def gemm(
    a,
    words,
    scales,
    gscale,
    out,
    m,
    n,
    k,
    stride_a,
    n_pad,
    tiles_k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    DEEP: tl.constexpr,
    MX: tl.constexpr,
    BF16: tl.constexpr,
    PTX: tl.constexpr,
):
    """One (BN of n, BM of m) tile over all of k: a 16-bit output tile; or, when SPLIT, over one of
    equal pieces of k: an fp32 partial sum at out[split, m, n] for `reduce` to finish. A step is of
    DEEP k-tiles, one when TMA.

    a (m, k) 16-bit, rows stride_a apart (when TMA, a descriptor of it with blocks of (BM, 128));
    words int32 (tiles_k, n_pad, 16); scales int16 or uint8 (tiles_k, n_pad, 4); gscale float32
    (1,). Grid: (tiles of n and m, splits).
    """
    tiles_n = tl.cdiv(n, BN)
    tiles_m = tl.cdiv(m, BM)
    pid = tl.program_id(0)
    # Tiles of GROUP columns of n go through all of m together, so their weights stay in the L2.
    width = GROUP * tiles_m
    group = pid // width
    size = tl.minimum(tiles_n - group * GROUP, GROUP)
    pid_n = group * GROUP + (pid % width) % size
    pid_m = (pid % width) // size
    split = tl.program_id(1)

    row = pid_n * BN + tl.arange(0, BN)
    col = pid_m * BM + tl.arange(0, BM)
    first = tiles_k * split // tl.num_programs(1)
    last = tiles_k * (split + 1) // tl.num_programs(1)
    # A tile taller than the padding may reach past the last row: it reads that row again.
    weight_row = tl.minimum(row, n_pad - 1) if BN > 128 else row
    start = (first.to(tl.int64) * n_pad + weight_row)[:, None]
    part = tl.arange(0, DEEP)[None, :, None]
    start = start[:, :, None] + part * n_pad
    word_at = words + start * 16 + tl.arange(0, 16)[None, None, :]
    scale_at = scales + start * 4 + tl.arange(0, 4)[None, None, :]
    end = k if DEEP == 1 else tl.minimum(k, last * 128)
    if not TMA:
        kk = first * 128 + tl.arange(0, 128 * DEEP)
        act_at = a + col.to(tl.int64)[:, None] * stride_a + kk[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last, DEEP):
        if TMA:
            act = a.load([pid_m * BM, tile * 128])
        else:
            act = tl.load(act_at, (col < m)[:, None] & (kk < end)[None, :], 0.0)
            kk += 128 * DEEP
            act_at += 128 * DEEP
        if DEEP == 1:
            word, scale = tl.load(word_at), tl.load(scale_at)
        else:
            # Past the last tile of this piece: codes of zero, under any scale that is a number.
            word = tl.load(word_at, tile + part < last, 0)
            scale = tl.load(scale_at, tile + part < last, 0)
        word = tl.permute(tl.reshape(word, (BN, DEEP, 4, 4)), (0, 1, 3, 2))
        scale = tl.broadcast_to(scale[:, :, :, None], (BN, DEEP, 4, 4))
        word, scale = tl.reshape(word, (BN, DEEP * 4, 4)), tl.reshape(scale, (BN, DEEP * 4, 4))
        w = _dequantise(word, scale, MX, BF16, PTX).to(act.dtype)
        acc = tl.dot(w, tl.trans(act), acc)
        if PTX:
            # A use of the sum that is no dot: wgmma must be over before the next step begins.
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, True, 1)
        word_at += DEEP * n_pad * 16
        scale_at += DEEP * n_pad * 4

    mask = (col < m)[:, None] & (row < n)[None, :]
    if SPLIT:
        at = (split.to(tl.int64) * m + col)[:, None] * n + row[None, :]
        tl.store(out + at, tl.trans(acc), mask)
    else:
        # Rounded before it is transposed: half the bytes through shared memory.
        res = (acc * (tl.load(gscale) * (16.0 if MX else 128.0))).to(out.dtype.element_ty)
        at = col.to(tl.int64)[:, None] * n + row[None, :]
        tl.store(out + at, tl.trans(res), mask)


@triton.jit(do_not_specialize=["count"])
def reduce(
    partial, gscale, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr, MX: tl.constexpr
):
    """out[i] = scale * sum over splits, in order, of partial[split, i], for i < count = m * n."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial + s * count.to(tl.int64) + i, mask, 0.0)
    res = total * (tl.load(gscale) * (16.0 if MX else 128.0))
    tl.store(out + i, res.to(out.dtype.element_ty), mask)
