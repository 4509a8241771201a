"""The check as one Triton kernel behind the GEMM: A and Y are read once, counters stay on the GPU.

Numbers are decoded from their bits, so that Triton's interpreter gives what a GPU does.
"""

# Triton reads annotations of kernels, so no postponed evaluation here.
import triton
import triton.language as tl


@triton.jit
def _half_of_bits(bits, IS_BF16: tl.constexpr):
    """float32 of the bits (int16) of a bf16 or fp16 number."""
    if IS_BF16:
        return ((bits.to(tl.int32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _e2m1_of_bits(code):
    code = code.to(tl.int32)
    exponent = (code >> 1) & 3
    mantissa = code & 1
    normal = (((exponent + 126) << 23) | (mantissa << 22)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.5, normal)
    return tl.where((code & 8) != 0, -size, size)


@triton.jit
def _e4m3_of_bits(byte):
    byte = byte.to(tl.int32) & 0xFF
    exponent = (byte >> 3) & 15
    mantissa = byte & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    size = tl.where((byte & 0x7F) == 0x7F, float("nan"), size)
    return tl.where((byte & 0x80) != 0, -size, size)


@triton.jit
def _e8m0_of_bits(byte):
    byte = byte.to(tl.int32) & 0xFF
    # Two factors: 2^-127 is no normal float32.
    half = ((tl.maximum(byte, 1)) << 23).to(tl.float32, bitcast=True)
    size = tl.where(byte == 0, half * 0.5, half)
    return tl.where(byte == 255, float("nan"), size)


@triton.jit
def _scale_at(row, col, cols, LAYOUT: tl.constexpr):
    """The byte offset of a block scale; `cols` scales a row (see `probes.layouts.offsets`)."""
    if LAYOUT == 0:
        return row * cols + col
    tiles = (cols + 3) // 4
    if LAYOUT == 2:
        return (row // 8 * tiles + col // 4) * 32 + row % 8 * 4 + col % 4
    return (row // 128 * tiles + col // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4


@triton.jit(do_not_specialize=["call", "phase", "period", "m", "groups", "count", "slots"])
def witness(
    a,  # (m, k) 16-bit as int16, or (m, k/2) codes as uint8
    a_scales,  # block scales of A as uint8, where it is FP4
    y,  # (m, n) 16-bit as int16
    bias,  # (n,) 16-bit as int16
    signs,  # int8 (2, n)
    sums,  # float32 (experts, groups, 2, k)
    alpha_w,  # float32 (experts,)
    alpha_a,  # float32 (1,): the activation's share
    experts,  # int32 (m,)
    gate,  # int32 (1,): 0 while signs and sums are made anew
    counters,  # int64 (8,): rows, skipped, suspicions, beyond, ticks, dropped records, -, -
    ring,  # uint8 (slots, slot_bytes)
    ring_state,  # int64 (2,): records claimed, and the claim from which the ring is full
    call,  # which call this is
    phase,
    period,  # one launch of so many is looked at
    m,
    n,
    k,
    a_stride,  # elements of a row of A (bytes, where it is FP4)
    y_stride,
    width,  # columns of a group
    groups,
    count,  # experts
    of_y,
    of_sum,
    floor,
    overflow,
    slots,
    slot_bytes,
    A_KIND: tl.constexpr,  # what A is made of: bf16, fp16, nvfp4, mxfp4
    LAYOUT: tl.constexpr,  # how its block scales lie: linear, 128x4, 8x4
    Y_BF16: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # even
    STEP: tl.constexpr,  # lanes of it: half as many where a byte holds two
):
    block = tl.program_id(0)
    group = tl.program_id(1)
    tick = tl.load(counters + 4)
    if (tl.load(gate) != 0) & ((tick + phase) % period == 0):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = row < m
        wide = row.to(tl.int64)
        expert = tl.zeros((ROWS,), tl.int32)
        here = inside
        if GROUPED:
            expert = tl.load(experts + row, mask=inside, other=-1)
            here = inside & (expert >= 0) & (expert < count)
            expert = tl.where(here, expert, 0)
        alpha = tl.load(alpha_a) * tl.load(alpha_w + expert)
        # -- what the row should add up to: a @ s, with every lane's sum of its own
        first = tl.zeros((ROWS, STEP), tl.float32)
        second = tl.zeros((ROWS, STEP), tl.float32)
        sizes = tl.zeros((ROWS, STEP), tl.float32)
        lane = tl.arange(0, STEP)
        base = sums + group.to(tl.int64) * 2 * k
        per_expert = groups.to(tl.int64) * 2 * k
        for start in range(0, k, BLOCK_K):
            if A_KIND >= 2:
                at = start // 2 + lane
                known = at < k // 2
                byte = tl.load(
                    a + wide[:, None] * a_stride + at[None, :],
                    mask=here[:, None] & known[None, :],
                    other=0,
                ).to(tl.int32)
                if A_KIND == 2:
                    cols = k // 16
                    where = _scale_at(wide[:, None], at[None, :] // 8, cols, LAYOUT)
                    raw = tl.load(a_scales + where, mask=here[:, None] & known[None, :], other=0)
                    scale = _e4m3_of_bits(raw)
                else:
                    cols = k // 32
                    where = _scale_at(wide[:, None], at[None, :] // 16, cols, LAYOUT)
                    raw = tl.load(a_scales + where, mask=here[:, None] & known[None, :], other=0)
                    scale = _e8m0_of_bits(raw)
                for half in tl.static_range(2):
                    value = _e2m1_of_bits((byte >> (4 * half)) & 15) * scale
                    one, two = _both_sums(
                        base, expert, per_expert, 2 * at + half, known, k, GROUPED
                    )
                    first += value * one
                    second += value * two
                    sizes += tl.abs(value) * tl.maximum(tl.abs(one), tl.abs(two))
            else:
                at = start + lane
                known = at < k
                bits = tl.load(
                    a + wide[:, None] * a_stride + at[None, :],
                    mask=here[:, None] & known[None, :],
                    other=0,
                )
                value = _half_of_bits(bits, A_KIND == 0)
                one, two = _both_sums(base, expert, per_expert, at, known, k, GROUPED)
                first += value * one
                second += value * two
                sizes += tl.abs(value) * tl.maximum(tl.abs(one), tl.abs(two))
        expected_1 = alpha * tl.sum(first, axis=1)
        expected_2 = alpha * tl.sum(second, axis=1)
        size = tl.abs(alpha) * tl.sum(sizes, axis=1)
        # -- what it adds up to
        across = tl.arange(0, BLOCK_N)
        col = group * width + across
        in_group = (across < width) & (col < n)
        y_bits = tl.load(
            y + wide[:, None] * y_stride + col[None, :],
            mask=inside[:, None] & in_group[None, :],
            other=0,
        )
        out = _half_of_bits(y_bits, Y_BF16)
        strange = tl.sum((tl.abs(out) < float("inf")).to(tl.int32), axis=1) != BLOCK_N
        large = tl.abs(out)
        if HAS_BIAS:
            b_bits = tl.load(bias + col, mask=in_group, other=0)
            out -= _half_of_bits(b_bits, Y_BF16)[None, :]
            large = tl.maximum(large, tl.abs(out))
        sign_1 = tl.load(signs + col, mask=in_group, other=0).to(tl.float32)
        sign_2 = tl.load(signs + n + col, mask=in_group, other=0).to(tl.float32)
        found_1 = tl.sum(out * sign_1[None, :], axis=1)
        found_2 = tl.sum(out * sign_2[None, :], axis=1)
        most = tl.max(large, axis=1)
        # Scaled, so that squares neither overflow nor vanish.
        unit = tl.where(most > 0, most, 1.0)
        part = large / unit[:, None]
        norm = unit * tl.sqrt(tl.sum(part * part, axis=1))
        # -- the judgement
        gap_1 = tl.abs(found_1 - expected_1)
        gap_2 = tl.abs(found_2 - expected_2)
        # Not tl.maximum: it lets a NaN go.
        gap = tl.where((gap_1 > gap_2) | (gap_1 != gap_1), gap_1, gap_2)
        limit = of_y * norm + of_sum * size + floor
        known_sum = (
            (tl.abs(expected_1) < float("inf"))
            & (tl.abs(expected_2) < float("inf"))
            & (size < float("inf"))
        )
        far = (tl.abs(expected_1) < overflow) & (tl.abs(expected_2) < overflow)
        judged = known_sum & (far | (strange == 0))
        fits = (gap <= limit) & (limit < float("inf")) & (strange == 0)
        suspicious = here & judged & (fits == 0)
        unsure = here & (judged == 0)
        skipped = inside & (here == 0)
        if tl.sum(unsure.to(tl.int32)) > 0:
            # Rows that are not judged: seldom, and then it is asked why.
            odd = tl.zeros((ROWS,), tl.int32)
            for start in range(0, k, BLOCK_K):
                if A_KIND >= 2:
                    at_ = start // 2 + lane
                    known_ = here[:, None] & (at_ < k // 2)[None, :]
                    if A_KIND == 2:
                        cols_ = k // 16
                        where_ = _scale_at(wide[:, None], at_[None, :] // 8, cols_, LAYOUT)
                        value_ = _e4m3_of_bits(tl.load(a_scales + where_, mask=known_, other=0))
                    else:
                        cols_ = k // 32
                        where_ = _scale_at(wide[:, None], at_[None, :] // 16, cols_, LAYOUT)
                        value_ = _e8m0_of_bits(tl.load(a_scales + where_, mask=known_, other=0))
                else:
                    at_ = start + lane
                    known_ = here[:, None] & (at_ < k)[None, :]
                    bits_ = tl.load(
                        a + wide[:, None] * a_stride + at_[None, :], mask=known_, other=0
                    )
                    value_ = _half_of_bits(bits_, A_KIND == 0)
                finite_ = tl.abs(value_) < float("inf")
                odd += tl.sum((finite_ == 0).to(tl.int32), axis=1)
            skipped = skipped | (here & (odd > 0))
            unsure = unsure & (odd == 0)
            left = tl.sum(unsure.to(tl.int64))
            if left > 0:
                tl.atomic_add(counters + 3, left)
        if group == 0:
            tl.atomic_add(counters, tl.sum((here & (skipped == 0)).to(tl.int64)))
            passed = tl.sum(skipped.to(tl.int64))
            if passed > 0:
                tl.atomic_add(counters + 1, passed)
        bad = tl.sum(suspicious.to(tl.int64))
        if bad > 0:
            tl.atomic_add(counters + 2, bad)
            which = tl.min(tl.where(suspicious, row, 0x7FFFFFFF))
            mine = row == which
            claim = tl.atomic_add(ring_state, 1)
            if claim < tl.load(ring_state + 1, volatile=True):
                record = ring + (claim % slots) * slot_bytes
                head = record.to(tl.pointer_type(tl.int64))
                tl.store(head + 1, call.to(tl.int64))
                tl.store(head + 2, which.to(tl.int64))
                tl.store(head + 3, group.to(tl.int64))
                tl.store(head + 4, tl.sum(tl.where(mine, expert, 0)).to(tl.int64))
                tl.store(head + 5, m.to(tl.int64))
                tl.store(head + 6, tick)
                numbers = (record + 64).to(tl.pointer_type(tl.float32))
                tl.store(numbers, tl.sum(tl.where(mine, gap, 0.0)))
                tl.store(numbers + 1, tl.sum(tl.where(mine, limit, 0.0)))
                tl.store(numbers + 2, tl.sum(tl.where(mine, alpha, 0.0)))
                at_row = which.to(tl.int64)
                evidence = record + 128
                if A_KIND >= 2:
                    for start in range(0, k // 2, BLOCK_N):
                        at_c = start + across
                        byte_c = tl.load(a + at_row * a_stride + at_c, mask=at_c < k // 2, other=0)
                        tl.store(evidence + at_c, byte_c, mask=at_c < k // 2)
                    evidence += k // 2
                    cols_s = k // 16 if A_KIND == 2 else k // 32
                    for start in range(0, cols_s, BLOCK_N):
                        at_s = start + across
                        where_s = _scale_at(at_row, at_s, cols_s, LAYOUT)
                        byte_s = tl.load(a_scales + where_s, mask=at_s < cols_s, other=0)
                        tl.store(evidence + at_s, byte_s, mask=at_s < cols_s)
                    evidence += (cols_s + 1) // 2 * 2
                else:
                    wide_to = evidence.to(tl.pointer_type(tl.int16))
                    for start in range(0, k, BLOCK_N):
                        at_w = start + across
                        bits_w = tl.load(a + at_row * a_stride + at_w, mask=at_w < k, other=0)
                        tl.store(wide_to + at_w, bits_w, mask=at_w < k)
                    evidence += 2 * k
                row_to = evidence.to(tl.pointer_type(tl.int16))
                bits_y = tl.load(y + at_row * y_stride + col, mask=in_group, other=0)
                tl.store(row_to + across, bits_y, mask=in_group)
                # The number of the claim last: with it the record is whole.
                tl.debug_barrier()
                tl.atomic_xchg(head, claim + 1)
            else:
                tl.atomic_add(counters + 5, 1)
    if (block == tl.num_programs(0) - 1) & (group == tl.num_programs(1) - 1):
        # By the last to begin: the others have read it. Were one later all the same, it would look
        # or not look as in the next launch, and still once in `period` launches.
        tl.atomic_add(counters + 4, 1)


@triton.jit
def _both_sums(base, expert, per_expert, at, known, k, GROUPED: tl.constexpr):
    """Both vectors' s at some k: (1, K), or (ROWS, K) where rows have experts of their own."""
    if GROUPED:
        place = base + expert.to(tl.int64)[:, None] * per_expert + at[None, :]
        one = tl.load(place, mask=known[None, :], other=0.0)
        two = tl.load(place + k, mask=known[None, :], other=0.0)
    else:
        one = tl.load(base + at, mask=known, other=0.0)[None, :]
        two = tl.load(base + k + at, mask=known, other=0.0)[None, :]
    return one, two


@triton.jit
def nothing(counters):
    """An empty kernel, to measure what a node costs."""
    if tl.program_id(0) < 0:
        tl.store(counters, 0)
