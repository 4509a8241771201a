"""What stands between the GEMMs of an MLP, as Triton kernels that wait as they should.

With `PDL` each block permits the next kernel to start at once and then waits for the kernels
before; without it (before SM90) a kernel starts when those are done. Both then sit out a delay
before they touch memory, so that whoever does not wait for them is surely too early.
"""

# Triton reads annotations of kernels, so no postponed evaluation here.
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..pdl._adversary_triton import delay, store_moves


@triton.jit(do_not_specialize=["step", "turns", "first", "last"])
def produce(
    step,  # `step` to `last` as in `_adversary_triton.write_late`
    delays,
    turns,
    rounds,
    times,
    moves,
    first,
    last,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where a norm stands: read the layer before, and store the next activation, late."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    delay(step, delays, turns, rounds, times)
    store_moves(moves, first, last, BLOCK)


@triton.jit(do_not_specialize=["step", "turns", "first", "last", "size", "scale"])
def silu_and_multiply(
    step,
    delays,
    turns,
    rounds,
    times,
    moves,  # what is stored besides, for activations that are quantised
    first,
    last,
    y,  # 16-bit floats (m, 2 * half): gate, then up
    copy,  # the same shape: the bytes of `y` that were read
    hidden,  # (m, half): silu(scale * gate) * (scale * up)
    size,  # m * half
    half,
    scale,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``hidden = silu(scale * gate) * (scale * up)``, late, keeping a copy of what was read."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    delay(step, delays, turns, rounds, times)
    block = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(block, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        left = at // half * (2 * half) + at % half
        # Volatile: not read before the delay is over.
        gate = tl.load(y + left, mask=inside, other=0, volatile=True)
        up = tl.load(y + left + half, mask=inside, other=0, volatile=True)
        tl.store(copy + left, gate, mask=inside)
        tl.store(copy + left + half, up, mask=inside)
        wide = gate.to(tl.float32) * scale
        value = wide / (1 + tl.exp(-wide)) * (up.to(tl.float32) * scale)
        tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=inside)
    store_moves(moves, first, last, BLOCK)
