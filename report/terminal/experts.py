"""Routed experts in words: one backend for a whole model, and times by routing law."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...cache import experts as routed
from ...cache.rows import Candidate, Timing
from ..documents import ExpertsOfModel, experts_of
from ..wording import law_times, range_text


def single_lines(
    candidates: Sequence[Candidate], meta: Mapping[str, Any] | None = None
) -> list[str]:
    """What one backend for all routed experts costs against the fastest of each bucket."""
    return [line for each in experts_of(candidates, meta) for line in _of_model(each)]


def _of_model(model: ExpertsOfModel) -> list[str]:
    layers = ", ".join(routed.layer_words(asdict(each.layer)) for each in model.layers)
    head = f"One backend for all {model.format} experts ({layers})"
    traffic = model.layers[0].traffic
    if not model.singles:
        return [f"{head}: none is safe wherever tokens of the traffic {traffic} were probed"]
    best, *others = model.singles
    loss = f"{best.loss_percent:.1f} % slower than the fastest of each bucket"
    lines = [f"{head}: {best.backend}, {loss}, weighed by the traffic {traffic}"]
    lines += [f"  {each.backend}: {each.loss_percent:.1f} % slower" for each in others]
    if model.default is not None:
        by_itself = f"  {model.scope[2]} by itself would take {model.default}"
        if model.default == best.backend:
            lines.append(f"{by_itself}, too")
        elif all(each.backend != model.default for each in others):
            lines.append(f"{by_itself}, which may not be chosen in every bucket here")
    return lines


def law_lines(timings: Iterable[Timing]) -> list[str]:
    """Microseconds of routed experts under each routing law."""
    rows = [row for row in timings if row.bucket.groups > 1 and law_times(row)]
    rows.sort(key=lambda row: (row.backend, row.bucket.n, row.bucket.k, row.bucket.m_lo))
    lines = ["By routing law, in microseconds:"] if rows else []
    for row in rows:
        laws = ", ".join(f"{law} {time.us:.1f}" for law, time in law_times(row).items())
        tokens = range_text(row.bucket.m_lo, row.bucket.m_hi)
        place = f"{row.bucket.n}x{row.bucket.k}"
        lines.append(f"  {row.backend}, {place}, {tokens} tokens: {laws}")
    return lines
