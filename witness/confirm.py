"""A suspicion judged: recomputed from its evidence, by the limits that a probe judges with.

Only what is confirmed here is a fault. A suspicion that is right after all is counted; one whose
weight cannot be had stays `suspected`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..probes.check.reference import tile_error, tolerance
from ..probes.check.rounding import OVERFLOW, UNIT_ROUNDOFF
from ..probes.check.tiles import TILE, tile_limit
from ..probes.formats import dequantise
from ..probes.problem import Fp4Tensor
from .ring import Record, RowEvidence
from .sources import SourceGone, WeightSource
from .vectors import Sums, agree, rows_of

FAULT, CLEARED, SUSPECTED = "fault", "cleared", "suspected"
NOT_AS_LOADED = "what is kept of the weight is not what was loaded"


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What became of a suspicion.

    status   ``fault``, ``cleared`` or ``suspected``
    wrong    elements that are off, or in a tile that is
    columns  first and last of them, as columns of the whole output; None without one
    error, allowed  relative error of the worst tile and its limit, or of the worst element
    why      in words
    """

    status: str
    why: str
    wrong: int = 0
    columns: tuple[int, int] | None = None
    error: float = 0.0
    allowed: float = 0.0


def confirm(
    record: Record,
    found: RowEvidence,
    source: WeightSource | None,
    sums: Sums,
    width: int | None = None,
    bias: torch.Tensor | None = None,
) -> Confirmation:
    """A suspicion against the reference, float64 on the host. `sums` are those of the weight, which
    say whether `source` still gives what was loaded.

    With a `width` of 24 bits, as a probe measured it, each element may be off by what design calls
    the tolerance, with the factor as it is or rounded to 16 bits, and rounded twice; with a shorter
    or unknown one the relative error of each 128 columns is held to that of a right tile. An
    infinity is right where the reference overflows.
    """
    if source is None:
        return Confirmation(
            SUSPECTED, "neither the checkpoint's file nor a copy of the weight is at hand"
        )
    columns = sums.groups.columns(record.group)
    try:
        kept = source.rows(record.expert, columns)
    except SourceGone as gone:
        return Confirmation(SUSPECTED, f"the weight cannot be read any more: {gone}")
    if not agree(sums, record.expert, record.group, kept):
        return Confirmation(SUSPECTED, NOT_AS_LOADED)
    weight = rows_of(kept, slice(0, columns.stop - columns.start)).cpu()
    a = found.a
    left = (
        dequantise(a, torch.float64, with_global=False) if isinstance(a, Fp4Tensor) else a.double()
    )
    y = found.y
    centre, sizes = left @ weight.T, left.abs() @ weight.abs().T
    spread = ((left * left) @ (weight * weight).T).sqrt() * abs(record.alpha)
    added = torch.zeros_like(centre) if bias is None else bias[columns].double().unsqueeze(0)
    reference = centre * record.alpha + added
    overflows = reference.abs() >= OVERFLOW[y.dtype] * (1 - 2.0**-6)
    right_infinity = overflows & torch.isinf(y) & (torch.signbit(y) == torch.signbit(reference))
    odd = ~torch.isfinite(y) & ~right_infinity
    if width == 24:
        off, error, allowed = _elements_off(record, (centre, sizes, added), y, left.shape[1])
        off = (off & ~right_infinity) | odd
    else:
        off, error, allowed = _tiles_off(
            torch.where(right_infinity, reference.to(y.dtype), y), reference, spread + added.abs(),
            left.shape[1],
        )  # fmt: skip
        off = off | odd
    if not bool(off.any()):
        return Confirmation(CLEARED, "the row is right", error=error, allowed=allowed)
    places = off[0].nonzero().flatten() + columns.start
    first, last = int(places[0]), int(places[-1])
    said = f"off by {error:.3g} where {allowed:.3g} is right"
    if bool(odd.any()):
        said = f"{int(odd.sum())} of them not finite"
    return Confirmation(
        FAULT,
        f"{len(places)} elements of row {record.row} are wrong, {said}",
        len(places),
        (first, last),
        error,
        allowed,
    )


def _elements_off(
    record: Record, parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], y: torch.Tensor, k: int
) -> tuple[torch.Tensor, float, float]:
    """bool (1, columns): which elements no kernel with a wide accumulator could have given."""
    centre, sizes, added = parts
    off: torch.Tensor | None = None
    worst = (float("inf"), 0.0)
    for alpha in {record.alpha, float(torch.tensor(record.alpha).to(y.dtype))}:
        slack = tolerance(centre, sizes, alpha, k, y.dtype, 2)
        slack = slack + 2 * UNIT_ROUNDOFF[y.dtype] * added.abs()
        far = (y.double() - (centre * alpha + added)).abs()
        mine = ~(far <= slack)
        if off is None or int(mine.sum()) < int(off.sum()):
            at = int((far / slack).nan_to_num(nan=float("inf")).argmax())
            off, worst = mine, (float(far.flatten()[at]), float(slack.flatten()[at]))
    assert off is not None
    return off, *worst


def _tiles_off(
    y: torch.Tensor, reference: torch.Tensor, spread: torch.Tensor, k: int
) -> tuple[torch.Tensor, float, float]:
    """bool (1, columns): the columns of tiles whose relative error is too large."""
    error = tile_error(y, reference, spread)
    allowed = tile_limit(k)
    bad = ~(error <= allowed)
    columns = bad.repeat_interleave(TILE, dim=1)[:, : y.shape[1]]
    return columns, float(error.amax()), allowed
