"""Problems of more than 2^31 elements: where an index of 32 bits wraps around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...backends import Backend
from ...check.sweep import GUARD, POISON, TILE, SlotReport
from ...launch.case import BackendRaised, Case, Launch, blame, prepared_activation, tensors
from ...launch.outcome import Budget, NotApplicable, Outcome, device_of, wait
from ...problem import Fp4Tensor

ELEMENTS = 1 << 31
_PERIOD = 257
"""Distinct rows of the activation, odd: no wrapped address finds the row it should have."""
_CHUNK = 1 << 26
"""Elements of the output that are compared at once."""
_SLACK = 2 << 30
_BEYOND = 129
_MOST_TILES = 64
Tiles = dict[tuple[int, int], int]


def huge(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """The layer at an m where the output or the activation passes 2^31 elements, once.

    The rows are the first few of the pool over and over, so that nothing large is drawn and the
    answer to each is known. Not applicable where the memory is not there; an item whose m range is
    not the largest, or whose backend refuses so many rows, is exempt.
    """
    device = device_of(cases)
    if device.type != "cuda":
        raise NotApplicable("a CPU would take too long over 2^31 elements")
    torch.cuda.empty_cache()
    return past(backend, cases, launches, ELEMENTS, torch.cuda.mem_get_info(device)[0])


def rows_for(n: int, k: int, elements: int) -> int:
    """The m at which the larger of m*n and m*k is past `elements`, and not a multiple of a tile."""
    return elements // max(n, k) + _BEYOND


def past(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], elements: int, room: int
) -> Outcome:
    """`huge` with another number of `elements`, where `room` bytes are free.

    Raises NotApplicable, with both numbers, where that is too little.
    """
    largest = max(launches, key=lambda launch: launch.m)
    case = cases[largest.case]
    n, k = case.problem.n, case.problem.k
    m = rows_for(n, k, elements)
    device = device_of(cases)
    one_row = sum(t[:1].nbytes for t in tensors(case.rows(0, 1)) if t.dim() == 2)
    need = m * (2 * n + 2 * one_row) + _SLACK
    if need > room:
        raise NotApplicable(
            f"m={m} takes {need / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are free"
        )
    why = "only the largest m range reaches so many elements"
    exempt = {launch.item: why for launch in launches if launch.item != largest.item}
    proof = {"m": m, "output_elements": m * n, "activation_elements": m * k}
    period = min(_PERIOD, case.problem.m - 1 | 1) if case.problem.m else 1
    index = torch.arange(m, device=device) % period
    activation = prepared_activation(backend, _pool_rows(case, index))
    guard = TILE * n
    memory = torch.full((m * n + 2 * guard,), GUARD, dtype=torch.int16, device=device)
    inside = memory[guard : guard + m * n]
    inside.fill_(POISON)
    out = inside.view(case.problem.dtype).view(m, n)
    try:
        with blame(backend):
            backend.run(case.state, activation, out, largest.tactic)
        wait(device)
    except (RuntimeError, BackendRaised) as error:
        wait(device)  # raises where the context is lost
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        exempt[largest.item] = f"m={m} was refused: {first[:200]}"
        return Outcome(0, (), 0, 0.0, proof=proof, exempt=exempt)
    stray = int((memory[:guard] != GUARD).sum() + (memory[guard + m * n :] != GUARD).sum())
    report = _compare(out, case, index, stray)
    launch = replace(largest, offset=0, m=m)
    changed = case.unchanged.changed()
    return Outcome(1, ((launch, report),), changed, 0.0, proof=proof, exempt=exempt)


def _pool_rows(case: Case, index: torch.Tensor) -> torch.Tensor | Fp4Tensor:
    a = case.rows(0, case.problem.m)
    if isinstance(a, Fp4Tensor):
        return replace(a, codes=a.codes[index], scales=a.scales[index])
    return a[index]


def _compare(out: torch.Tensor, case: Case, index: torch.Tensor, stray: int) -> SlotReport:
    """Every element against the answer to its row, a part of the output at a time."""
    m, n = out.shape
    step = max(TILE, _CHUNK // n // TILE * TILE)
    wrong = unwritten = not_finite = 0
    witness: tuple[int, int, float, float, float] | None = None
    tiles: Tiles = {}
    for first in range(0, m, step):
        part = out[first : first + step]
        rows = index[first : first + step]
        lo, hi = case.expectation.lo[rows], case.expectation.hi[rows]
        bad = ~((part >= lo) & (part <= hi))
        count = int(bad.sum())
        if not count:
            continue
        wrong += count
        poison = bad & (part.view(torch.int16) == POISON)
        unwritten += int(poison.sum())
        not_finite += int((bad & ~poison & ~torch.isfinite(part)).sum())
        if witness is None:
            at = int(bad.flatten().int().argmax())
            row, col = divmod(at, n)
            values = (float(x[row, col]) for x in (part, lo, hi))
            found, low, high = values
            witness = (first + row, col, found, low, high)
        _mark_tiles(bad, first // TILE, tiles)
    return SlotReport(
        wrong=wrong,
        unwritten=unwritten,
        not_finite=not_finite,
        bad_launches=int(wrong > 0),
        guard=stray,
        witness=witness,
        tiles=tuple((row, col, count) for (row, col), count in tiles.items()),
    )


def _mark_tiles(bad: torch.Tensor, first: int, tiles: Tiles) -> None:
    """Count the bad elements of each tile, for the first few tiles."""
    if len(tiles) >= _MOST_TILES:
        return
    rows, columns = bad.shape
    down, across = -(-rows // TILE) * TILE - rows, -(-columns // TILE) * TILE - columns
    whole = torch.nn.functional.pad(bad, (0, across, 0, down))
    counts = whole.view(-1, TILE, whole.shape[1] // TILE, TILE).sum(dim=(1, 3))
    for row, col in counts.nonzero()[: _MOST_TILES - len(tiles)].tolist():
        tiles[first + row, col] = int(counts[row, col])
