"""The adversaries as Triton kernels, and the controls they are tried on. SM90 and newer.

Every adversary begins alike: each block permits the next kernel to start, and then spins until the
delay has passed by the GPU's clock. What it does to memory comes after that, and only then. The
few blocks there are do all of it together, whatever the size.
"""

# Triton reads annotations of kernels, so no postponed evaluation here.
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer


@triton.jit
def delay(step, delays, turns, rounds, times):
    """Wait out this round's delay, and note when that was over."""
    begin = globaltimer()
    turn = (tl.load(rounds) + step) % turns
    long = tl.load(delays + step * turns + turn)
    now = begin
    while now - begin < long:
        now = globaltimer()
    tl.store(times + step * tl.num_programs(0) + tl.program_id(0), now)


@triton.jit
def store_moves(moves, first, last, BLOCK: tl.constexpr):
    """Copy memory: all programs together, move after move."""
    block = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for move in range(first, last):
        source = tl.load(moves + move * 3)
        target = tl.load(moves + move * 3 + 1)
        size = tl.load(moves + move * 3 + 2)
        # Volatile: not read before the delay is over.
        if (source | target | size) % 8 == 0:
            words = size // 8
            for start in range(block, words, stride):
                at = start + tl.arange(0, BLOCK)
                inside = at < words
                data = tl.load(source.to(tl.pointer_type(tl.int64)) + at, inside, volatile=True)
                tl.store(target.to(tl.pointer_type(tl.int64)) + at, data, inside)
        else:
            for start in range(block, size, stride):
                at = start + tl.arange(0, BLOCK)
                inside = at < size
                byte = tl.load(source.to(tl.pointer_type(tl.int8)) + at, inside, volatile=True)
                tl.store(target.to(tl.pointer_type(tl.int8)) + at, byte, inside)


@triton.jit(do_not_specialize=["step", "turns", "first", "last"])
def write_late(
    step,  # which step of the chain this is
    delays,  # int64 (steps, turns): nanoseconds
    turns,
    rounds,  # int64 (1,): how many chains came before
    times,  # int64 (steps, programs): when each program began to store
    moves,  # int64 (moves, 3): address to read, address to write, bytes
    first,  # the moves of this step
    last,
    BLOCK: tl.constexpr,
):
    """Read-after-write: store the real activation, late."""
    gdc_launch_dependents()
    delay(step, delays, turns, rounds, times)
    store_moves(moves, first, last, BLOCK)


@triton.jit(do_not_specialize=["step", "turns", "first", "last", "poison"])
def read_late(
    step,
    delays,
    turns,
    rounds,
    times,
    places,  # int64 (outputs, 4): address of the output; m; n; its first tile in `bitmap`
    first,  # the outputs of this step
    last,
    counts,  # int64 (outputs, 3): elements written early, bad rounds, last bad round
    bitmap,  # int32 (tiles,): elements written early in that tile
    poison,  # what four elements of the output hold where nobody has written, as one integer
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write-after-read: read the output, late; whoever may write it has to wait for this read."""
    gdc_launch_dependents()
    delay(step, delays, turns, rounds, times)
    for place in range(first, last):
        out = tl.load(places + place * 4)
        m = tl.load(places + place * 4 + 1)
        n = tl.load(places + place * 4 + 2)
        marks = bitmap + tl.load(places + place * 4 + 3)
        columns = tl.cdiv(n, TILE)
        words = m * n // 4
        early = tl.zeros((), tl.int64)
        block = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(block, words, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            # Volatile: neither moved before the delay nor served by this SM's own cache.
            four = tl.load(
                out.to(tl.pointer_type(tl.int64)) + at, mask=at < words, other=poison, volatile=True
            )
            differ = four ^ poison
            if tl.max((differ != 0).to(tl.int32)) > 0:
                found = tl.zeros((BLOCK,), tl.int32)
                for lane in tl.static_range(4):
                    found += (((differ >> (16 * lane)) & 0xFFFF) != 0).to(tl.int32)
                # Four neighbours count for the tile of the first of them.
                tile = at * 4 // n // TILE * columns + at * 4 % n // TILE
                tl.atomic_add(marks + tile, found, mask=found > 0)
                early += tl.sum(found)
        if tl.program_id(0) == 0:
            rest = words * 4 + tl.arange(0, 4)
            end = tl.load(
                out.to(tl.pointer_type(tl.int16)) + rest, mask=rest < m * n, other=0, volatile=True
            )
            odd = ((rest < m * n) & (end != poison.to(tl.int16))).to(tl.int32)
            tl.atomic_add(marks + rest // n // TILE * columns + rest % n // TILE, odd, mask=odd > 0)
            early += tl.sum(odd)
        if early > 0:
            now = tl.load(rounds) + 1
            tl.atomic_add(counts + place * 3, early)
            if tl.atomic_max(counts + place * 3 + 2, now) < now:
                tl.atomic_add(counts + place * 3 + 1, 1)


@triton.jit(do_not_specialize=["step", "turns", "first", "last", "pattern"])
def overwrite_late(
    step,
    delays,
    turns,
    rounds,
    times,
    places,  # as in `read_late`
    first,
    last,
    pattern,  # what to leave in four elements of the output, as one integer
    BLOCK: tl.constexpr,
):
    """Write-after-write: store into the output, late; whoever waits then overwrites it."""
    gdc_launch_dependents()
    delay(step, delays, turns, rounds, times)
    for place in range(first, last):
        out = tl.load(places + place * 4)
        size = tl.load(places + place * 4 + 1) * tl.load(places + place * 4 + 2)
        words = size // 4
        block = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(block, words, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            four = tl.full((BLOCK,), pattern, tl.int64)
            tl.store(out.to(tl.pointer_type(tl.int64)) + at, four, mask=at < words)
        if tl.program_id(0) == 0:
            rest = words * 4 + tl.arange(0, 4)
            one = tl.full((4,), pattern, tl.int64).to(tl.int16)
            tl.store(out.to(tl.pointer_type(tl.int16)) + rest, one, mask=rest < size)


@triton.jit
def control(
    source,
    target,
    size,
    began,  # int64 (1,): when the first program started
    WAIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy 16-bit elements, as a dependent that waits for its predecessor, or does not."""
    if tl.program_id(0) == 0:
        tl.store(began, globaltimer())
    if WAIT:
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)
