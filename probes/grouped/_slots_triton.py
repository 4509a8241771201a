"""Triton kernels around grouped GEMMs: sort slots by expert, spread rows, activate, combine."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots", "groups", "block"])
def sort(
    ids,
    rows,
    places,
    experts,
    offsets,
    counts,
    total,
    slots,
    groups,
    block,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program an expert: see `slots.sort_slots`.

    BINS is a power of two above `groups`; each program counts every expert's slots.
    """
    mine = tl.program_id(0)
    bins = tl.arange(0, BINS)
    lane = tl.arange(0, STEP)
    count = tl.zeros((BINS,), tl.int32)
    for first in range(0, slots, STEP):
        key = tl.load(ids + first + lane, mask=first + lane < slots, other=-1)
        here = (key >= 0) & (key < groups)
        count += tl.histogram(tl.where(here, key, BINS - 1), BINS)
    count = tl.where(bins < groups, count, 0)
    padded = (count + block - 1) // block * block
    start = tl.sum(tl.where(bins < mine, padded, 0), 0)
    own = tl.sum(tl.where(bins == mine, count, 0), 0)
    end = start + (own + block - 1) // block * block
    row = start
    for first in range(0, slots, STEP):
        at = first + lane
        key = tl.load(ids + at, mask=at < slots, other=-1)
        match = key == mine
        ranked = row + tl.cumsum(match.to(tl.int32), 0) - 1
        tl.store(rows + ranked, at, mask=match)
        tl.store(places + at, ranked, mask=match)
        if mine == 0:
            tl.store(places + at, -1, mask=((key < 0) | (key >= groups)) & (at < slots))
        row += tl.sum(match.to(tl.int32), 0)
    for first in range(start + own, end, STEP):
        tl.store(rows + first + lane, slots, mask=first + lane < end)
    for first in range(start // block, end // block, STEP):
        tl.store(experts + first + lane, mine, mask=first + lane < end // block)
    tl.store(offsets + mine, start)
    tl.store(counts + mine, own)
    if mine == groups - 1:
        tl.store(offsets + groups, end)
        tl.store(total, end)


@triton.jit
def spread(x, places, out, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[places[t, j]] = x[t], where a place is not negative; x (tokens, columns)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + token * columns + at, mask=at < columns)
    for j in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + j).to(tl.int64)
        tl.store(out + place * columns + at, value, mask=at < tl.where(place >= 0, columns, 0))


@triton.jit
def activate(
    h13,
    h,
    n,
    alpha,
    offset,
    limit,
    GATED: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The activation of rows (2 n, or n where nothing gates), gates first, in float32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if GATED:
        gate = tl.load(h13 + row * 2 * n + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h13 + row * 2 * n + n + at, mask=inside, other=0.0).to(tl.float32)
        if CLAMPED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        value = gate / (1.0 + tl.exp(-alpha * gate)) * (up + offset)
    else:
        gate = tl.load(h13 + row * n + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0)
    tl.store(h + row * n + at, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def combine(
    y,
    places,
    weights,
    out,
    columns,
    scaling,
    SORTED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = scaling * sum_j weights[t, j] * y[row of slot t, j], slots elsewhere left out.

    A slot's row is its place where y is SORTED, else its own number.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        slot = token * TOP_K + j
        place = tl.load(places + slot).to(tl.int64)
        here = place >= 0
        row = place if SORTED else slot
        weight = tl.load(weights + slot)
        value = tl.load(y + row * columns + at, mask=at < tl.where(here, columns, 0), other=0.0)
        total += tl.where(here, value.to(tl.float32) * weight, 0.0)
    done = (total * scaling).to(out.dtype.element_ty)
    tl.store(out + token * columns + at, done, mask=at < columns)
