"""The fused check as one Triton kernel: read every output once, judge it, poison it again."""

# Triton reads annotations of kernels, so no postponed evaluation here.
import triton
import triton.language as tl


@triton.jit
def sweep(
    slots,  # int64 (slots, 5): address of out, lo, hi; m; n
    tiles,  # int32 (tiles, 3): slot, row of tile, column of tile
    counts,  # int64 (slots, 6): wrong, unwritten, not finite, bad launches, last and first of them
    witness,  # int64 (slots,): smallest (flat index << 16 | bits) of a wrong element
    bitmap,  # int32 (tiles,): wrong elements in that tile so far
    launch,  # int64 (1,): how many sweeps came before
    poison,  # the 16-bit pattern to leave behind, as a signed integer
    IS_BF16: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether every row of every out, lo and hi begins at 16 bytes
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    slot = tl.load(tiles + program * 3).to(tl.int64)
    tile_row = tl.load(tiles + program * 3 + 1).to(tl.int64)
    tile_col = tl.load(tiles + program * 3 + 2).to(tl.int64)
    out = tl.load(slots + slot * 5).to(tl.pointer_type(tl.int16))
    lo = tl.load(slots + slot * 5 + 1).to(tl.pointer_type(tl.int16))
    hi = tl.load(slots + slot * 5 + 2).to(tl.pointer_type(tl.int16))
    m = tl.load(slots + slot * 5 + 3)
    n = tl.load(slots + slot * 5 + 4)
    if ALIGNED:
        # Numbers from memory: without a word 16 bytes would be read two at a time.
        out = tl.multiple_of(out, 16)
        lo = tl.multiple_of(lo, 16)
        hi = tl.multiple_of(hi, 16)
        n = tl.multiple_of(n, 8)
    two_ends = lo.to(tl.int64) != hi.to(tl.int64)  # exact problems have one answer
    across = tl.arange(0, TILE)
    in_row = across < n - tile_col * TILE
    wrong_total = tl.zeros((), tl.int64)
    unwritten_total = tl.zeros((), tl.int64)
    not_finite_total = tl.zeros((), tl.int64)
    first = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    corner = tile_row * TILE * n + tile_col * TILE
    height = tl.minimum(m - tile_row * TILE, TILE).to(tl.int32)
    for step in range(0, height, ROWS):
        down = step + tl.arange(0, ROWS)
        inside = (down < height)[:, None] & in_row[None, :]
        index = down.to(tl.int64)[:, None] * n + across[None, :]
        bits = tl.load(out + corner + index, mask=inside, other=0)
        lo_bits = tl.load(lo + corner + index, mask=inside, other=0)
        hi_bits = lo_bits
        if two_ends:
            hi_bits = tl.load(hi + corner + index, mask=inside, other=0)
        if IS_BF16:
            value = bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
            low = lo_bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
            high = hi_bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
        else:
            value = bits.to(tl.float16, bitcast=True).to(tl.float32)
            low = lo_bits.to(tl.float16, bitcast=True).to(tl.float32)
            high = hi_bits.to(tl.float16, bitcast=True).to(tl.float32)
        right = (value >= low) & (value <= high)  # false for NaN
        wrong = inside & (right == 0)
        wrong_here = tl.sum(wrong.to(tl.int32))
        # What is wrong with it is asked where something is: nearly never.
        if wrong_here > 0:
            unwritten = wrong & (bits == poison)
            finite = (value == value) & (tl.abs(value) != float("inf"))
            not_finite = wrong & (unwritten == 0) & (finite == 0)
            wrong_total += wrong_here
            unwritten_total += tl.sum(unwritten.to(tl.int32))
            not_finite_total += tl.sum(not_finite.to(tl.int32))
            place = down[:, None] * TILE + across[None, :]
            least = tl.min(tl.where(wrong, place, TILE * TILE))
            there = tl.sum(tl.where(place == least, bits.to(tl.int32) & 0xFFFF, 0))
            flat = corner + (least // TILE).to(tl.int64) * n + least % TILE
            first = tl.minimum(first, (flat << 16) | there)
        tl.store(out + corner + index, tl.full((ROWS, TILE), poison, tl.int16), mask=inside)
    if wrong_total > 0:
        now = tl.load(launch) + 1
        tl.atomic_add(counts + slot * 6, wrong_total)
        tl.atomic_add(counts + slot * 6 + 1, unwritten_total)
        tl.atomic_add(counts + slot * 6 + 2, not_finite_total)
        # The first tile of this sweep to raise the mark counts the launch, the others do not.
        if tl.atomic_max(counts + slot * 6 + 4, now) < now:
            tl.atomic_add(counts + slot * 6 + 3, 1)
        tl.atomic_min(counts + slot * 6 + 5, now)
        tl.atomic_min(witness + slot, first)
        tl.atomic_add(bitmap + program, wrong_total.to(tl.int32))
