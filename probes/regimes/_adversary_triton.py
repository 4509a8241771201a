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
def _hold(step, delays, turns, rounds, times):
    """Trigger, wait out this round's delay, and note when that was over."""
    gdc_launch_dependents()
    begin = globaltimer()
    turn = (tl.load(rounds) + step) % turns
    delay = tl.load(delays + step * turns + turn)
    now = begin
    while now - begin < delay:
        now = globaltimer()
    tl.store(times + step * tl.num_programs(0) + tl.program_id(0), now)


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
    _hold(step, delays, turns, rounds, times)
    block = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for move in range(first, last):
        source = tl.load(moves + move * 3)
        target = tl.load(moves + move * 3 + 1)
        size = tl.load(moves + move * 3 + 2)
        if (source | target | size) % 8 == 0:
            words = size // 8
            for start in range(block, words, stride):
                at = start + tl.arange(0, BLOCK)
                data = tl.load(source.to(tl.pointer_type(tl.int64)) + at, mask=at < words)
                tl.store(target.to(tl.pointer_type(tl.int64)) + at, data, mask=at < words)
        else:
            for start in range(block, size, stride):
                at = start + tl.arange(0, BLOCK)
                byte = tl.load(source.to(tl.pointer_type(tl.int8)) + at, mask=at < size)
                tl.store(target.to(tl.pointer_type(tl.int8)) + at, byte, mask=at < size)


@triton.jit(do_not_specialize=["step", "turns", "poison"])
def read_late(
    step,
    delays,
    turns,
    rounds,
    times,
    places,  # int64 (steps, 4): address of the output; m; n; its first tile in `bitmap`
    counts,  # int64 (steps, 3): elements written early, bad rounds, last bad round
    bitmap,  # int32 (tiles,): elements written early in that tile
    poison,  # what four elements of the output hold where nobody has written, as one integer
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write-after-read: read the output, late; whoever may write it has to wait for this read."""
    _hold(step, delays, turns, rounds, times)
    out = tl.load(places + step * 4)
    m = tl.load(places + step * 4 + 1)
    n = tl.load(places + step * 4 + 2)
    marks = bitmap + tl.load(places + step * 4 + 3)
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
        last = tl.load(
            out.to(tl.pointer_type(tl.int16)) + rest, mask=rest < m * n, other=0, volatile=True
        )
        found = ((rest < m * n) & (last != poison.to(tl.int16))).to(tl.int32)
        tl.atomic_add(marks + rest // n // TILE * columns + rest % n // TILE, found, mask=found > 0)
        early += tl.sum(found)
    if early > 0:
        now = tl.load(rounds) + 1
        tl.atomic_add(counts + step * 3, early)
        if tl.atomic_max(counts + step * 3 + 2, now) < now:
            tl.atomic_add(counts + step * 3 + 1, 1)


@triton.jit(do_not_specialize=["step", "turns", "pattern"])
def overwrite_late(
    step,
    delays,
    turns,
    rounds,
    times,
    places,  # as in `read_late`
    pattern,  # what to leave in four elements of the output, as one integer
    BLOCK: tl.constexpr,
):
    """Write-after-write: store into the output, late; whoever waits then overwrites it."""
    _hold(step, delays, turns, rounds, times)
    out = tl.load(places + step * 4)
    size = tl.load(places + step * 4 + 1) * tl.load(places + step * 4 + 2)
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
