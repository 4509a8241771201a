"""Filling a workspace, from its beginning to its end, or from elsewhere to elsewhere."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first", "last"])
def fill(memory, first, last, BLOCK: tl.constexpr):
    """Store 1 into ``memory[first:last]`` (int8)."""
    at = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(memory + at, tl.full((BLOCK,), 1, tl.int8), at < last)
