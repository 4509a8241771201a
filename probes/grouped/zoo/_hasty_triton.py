"""A copy as a Triton kernel that is launched with PDL, and waits or does not. SM90 and newer."""

# Triton reads annotations of kernels, so no postponed evaluation here.
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def copy(source, target, size, WAIT: tl.constexpr, BLOCK: tl.constexpr):
    """Copy 16-bit elements."""
    if WAIT:
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)
