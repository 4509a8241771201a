"""One launch in front of an engine's kernels: local ids of experts, and scaled router weights."""

from __future__ import annotations

import triton
import triton.language as tl


# One variant: another batch must not be compiled for while it is captured in a graph.
@triton.jit(do_not_specialize=["slots", "groups", "elsewhere"])
def localise(
    ids,
    found,
    weights,
    scaled,
    slots,
    groups,
    elsewhere,
    scaling,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    """See `_experts.localised`."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    there = at < slots
    expert = tl.load(ids + at, mask=there, other=0)
    here = (expert >= 0) & (expert < groups)
    tl.store(found + at, tl.where(here, expert, elsewhere), mask=there)
    if weighted:
        weight = tl.load(weights + at, mask=there, other=0.0)
        tl.store(scaled + at, weight * scaling, mask=there)
