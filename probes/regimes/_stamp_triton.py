"""The GPU's clock: written to memory in stream order, and waited for."""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def stamp(times, index):
    """Store the GPU's nanosecond clock in ``times[index]`` (int64)."""
    tl.store(times + index, globaltimer())


@triton.jit(do_not_specialize=["nanoseconds"])
def spin(nanoseconds):
    """Be resident for so long, and do nothing."""
    begin = globaltimer()
    now = begin
    while now - begin < nanoseconds:
        now = globaltimer()
