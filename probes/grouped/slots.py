"""What is around the GEMMs of libraries that bring only those: sorted slots, rows to and fro.

A *slot* is token * top_k + place. On a GPU these are Triton kernels that enqueue only, on a CPU the
same in torch; the sorted order is stable, so both give one answer.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .families import TOP_K
from .problem import ExpertsProblem, Gate

_BLOCK = 1024
"""Columns that a program moves."""
_LEAST_STEP, _STEP = 128, 2048
"""Slots that a program looks at at once."""


@dataclass(frozen=True, slots=True)
class SortedSlots:
    """Slots in the order of their experts, each expert's padded to whole blocks.

    rows     int32 (most rows,): whose slot each row is; the number of slots in rows of padding.
             What is behind the last expert's is not written
    places   int32 (tokens, top_k): the row of each slot, -1 of those that are elsewhere
    experts  int32 (most rows / block,): whose each block is, as far as there are any
    offsets  int32 (groups + 1,): each expert's first row, and the end of the last one's
    counts   int32 (groups,)
    total    int32 (1,): the end of the last one's
    """

    rows: torch.Tensor
    places: torch.Tensor
    experts: torch.Tensor
    offsets: torch.Tensor
    counts: torch.Tensor
    total: torch.Tensor


def most_rows(slots: int, groups: int, block: int) -> int:
    """The most rows that so many slots can take, in whole blocks."""
    padded = slots + min(slots, groups) * (block - 1)
    return -(-padded // block) * block


def sort_slots(ids: torch.Tensor, groups: int, block: int = 1) -> SortedSlots:
    """The slots of int32 ids (tokens, top_k) by expert; those outside [0, groups) are left out.

    Every slot has a row of its own, and an expert's rows are in the order of its slots.
    """
    ids = ids.contiguous()
    made = _empty(ids, groups, block)
    if ids.device.type == "cpu":
        return _sort_on_host(ids, groups, block, made)
    from . import _slots_triton as kernels

    slots = ids.numel()
    kernels.sort[(groups,)](
        ids,
        made.rows,
        made.places,
        made.experts,
        made.offsets,
        made.counts,
        made.total,
        slots,
        groups,
        block,
        BINS=1 << groups.bit_length(),
        STEP=min(_STEP, max(_LEAST_STEP, 1 << (slots - 1).bit_length())),
        num_warps=4,
    )
    return made


def _empty(ids: torch.Tensor, groups: int, block: int) -> SortedSlots:
    rows = most_rows(ids.numel(), groups, block)

    def fresh(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=ids.device)

    return SortedSlots(
        rows=fresh(rows),
        places=torch.empty_like(ids),
        experts=fresh(rows // block),
        offsets=fresh(groups + 1),
        counts=fresh(groups),
        total=fresh(1),
    )


def _sort_on_host(ids: torch.Tensor, groups: int, block: int, made: SortedSlots) -> SortedSlots:
    flat = ids.flatten().long()
    slots = flat.numel()
    key = torch.where((flat >= 0) & (flat < groups), flat, groups)
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=groups + 1)[:groups]
    ends = ((counts + block - 1) // block * block).cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends))
    whose = key[order]
    here = whose < groups
    before = counts.cumsum(0) - counts
    row = starts[whose[here]] + torch.arange(slots)[here] - before[whose[here]]
    end = int(ends[-1])
    made.rows[:end] = slots
    made.rows[row] = order[here].int()
    places = torch.full((slots,), -1, dtype=torch.int32)
    places[order[here]] = row.int()
    made.places.copy_(places.view_as(ids))
    blocks = torch.repeat_interleave(torch.arange(groups), (ends - starts[:-1]) // block)
    made.experts[: len(blocks)] = blocks.int()
    made.offsets.copy_(starts)
    made.counts.copy_(counts)
    made.total.fill_(end)
    return made


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """Tokens in as many rows for each expert as there are tokens, the first `counts` of them used.

    places  int32 (tokens, top_k): row of each slot in (groups * tokens); one expert's twice in a
            token's choice are one row; -1 of slots that are elsewhere
    counts  int32 (groups,)
    """

    places: torch.Tensor
    counts: torch.Tensor


def mask_rows(ids: torch.Tensor, groups: int) -> MaskedRows:
    """Where each expert's tokens are, in the order of tokens; enqueues only."""
    tokens = ids.shape[0]
    here = (ids >= 0) & (ids < groups)
    expert = torch.where(here, ids, groups).long()
    chosen = torch.zeros(tokens, groups + 1, dtype=torch.int32, device=ids.device)
    chosen.scatter_(1, expert, 1)
    rank = chosen.cumsum(0, dtype=torch.int32).gather(1, expert) - 1
    places = torch.where(here, ids * tokens + rank, -1).int()
    return MaskedRows(places, chosen[:, :groups].sum(0, dtype=torch.int32))


def spread_rows(x: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, columns): each row of x (tokens, columns) at its places, the rest unwritten."""
    out = x.new_empty(rows, x.shape[1])
    if x.device.type == "cpu":
        flat = places.flatten().long()
        here = flat >= 0
        out[flat[here]] = x.repeat_interleave(places.shape[1], dim=0)[here]
        return out
    from . import _slots_triton as kernels

    kernels.spread[_grid(*x.shape)](
        x.contiguous(), places, out, x.shape[1], TOP_K=places.shape[1], BLOCK=_BLOCK
    )
    return out


def gather_slots(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(tokens, top_k, columns): each slot's row, zeros where it is elsewhere."""
    found = rows[places.long().clamp(min=0)]
    return torch.where((places >= 0).unsqueeze(2), found, torch.zeros_like(found))


def activate_rows(h13: torch.Tensor, gate: Gate, n: int) -> torch.Tensor:
    """The activation of rows (.., rows of w13), as (.., n), computed in float32."""
    flat = h13.reshape(-1, h13.shape[-1])
    out = h13.new_empty(flat.shape[0], n)
    if h13.device.type == "cpu":
        wide = flat.float()
        if not gate.gated:
            out.copy_(wide.clamp(min=0).square())
        else:
            g, u = wide[:, :n], wide[:, n:]
            if gate.limit is not None:
                g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
            out.copy_(g / (1 + torch.exp(-gate.alpha * g)) * (u + gate.offset))
    elif flat.shape[0]:
        from . import _slots_triton as kernels

        kernels.activate[_grid(flat.shape[0], n)](
            flat,
            out,
            n,
            gate.alpha,
            gate.offset,
            gate.limit or 0.0,
            GATED=gate.gated,
            CLAMPED=gate.limit is not None,
            BLOCK=_BLOCK,
        )
    return out.view(*h13.shape[:-1], n)


def combine_rows(
    y: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    in_order_of: str = "places",
) -> None:
    """``out[t] = scaling * sum_j weights[t, j] * y[row]``, slots elsewhere left out, float32 sums.

    y (rows, columns) in the order of `places`, or of ``slots``; out (tokens, columns).
    """
    top_k = places.shape[1]
    if y.device.type == "cpu":
        slots = torch.arange(places.numel()).view_as(places)
        rows = places if in_order_of == "places" else torch.where(places >= 0, slots, -1)
        each = gather_slots(y, rows).float() * torch.where(rows >= 0, weights, 0.0).unsqueeze(2)
        out.copy_(each.sum(dim=1) * scaling)
        return
    from . import _slots_triton as kernels

    kernels.combine[_grid(*out.shape)](
        y,
        places,
        weights.contiguous(),
        out,
        out.shape[1],
        scaling,
        SORTED=in_order_of == "places",
        TOP_K=top_k,
        BLOCK=_BLOCK,
    )


def _grid(rows: int, columns: int) -> Any:
    return rows, -(-columns // _BLOCK)


# Compiling ahead


def run_top_ks(problem: ExpertsProblem) -> tuple[int, ...]:
    """The numbers of experts a token that a layer is run with: its own first, then those of
    families of odd routing."""
    odd = (k for k in TOP_K.values() if k <= problem.groups)
    return tuple(dict.fromkeys((problem.top_k, *odd)))


def routed_batches(
    problem: ExpertsProblem, tokens: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids int32, router weights float32), both (rows, top_k): batches that a Triton kernel which
    is given them in a launch of up to `tokens` tokens may be compiled for, one of each kind.

    Kinds differ in the experts a token has, in how many slots `sort_slots` looks at at once, and in
    whether the batch is a window that begins behind a row of other tokens: where a row's bytes are
    no multiple of 16, Triton compiles once more for such addresses.
    """
    for top_k in run_top_ks(problem):
        for step in _steps(tokens * top_k):
            rows = max(1, min(tokens, step // top_k))
            slots = torch.arange((rows + 1) * top_k, dtype=torch.int32, device=device)
            ids = (slots % problem.groups).view(-1, top_k)
            weights = torch.ones(ids.shape, device=device)
            for window in (slice(rows), slice(1, None)):
                yield ids[window], weights[window]


def _steps(slots: int) -> Iterator[int]:
    """What `sort_slots` looks at at once in batches of up to so many slots."""
    step = _LEAST_STEP
    yield step
    while step < min(slots, _STEP):
        step *= 2
        yield step


def compile_slots(
    problem: ExpertsProblem, tokens: int, device: torch.device, uses: Container[str]
) -> None:
    """Compile what a backend calls of this module in launches of up to `tokens` tokens, by calling
    it: nothing may be compiled later, within a measurement or while a graph is captured.

    uses  of ``sort``, ``spread``, and the orders that it combines in, ``places`` and ``slots``
    """
    for ids, weights in routed_batches(problem, tokens, device):
        if "sort" in uses:
            sort_slots(ids, problem.groups)
        top_k = ids.shape[1]
        x = torch.zeros(1, problem.k, dtype=problem.dtype, device=device)
        places = torch.arange(top_k, dtype=torch.int32, device=device).view(1, -1)
        if "spread" in uses:
            spread_rows(x, places, top_k)
        for order in ("places", "slots"):
            if order in uses:
                y = x.new_zeros(top_k, problem.k)
                combine_rows(y, places, weights[:1], x, problem.scaling, in_order_of=order)
