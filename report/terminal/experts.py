"""Routed experts in words: one backend for a whole model, and times by routing law."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...autotune.choice import layouts
from ...autotune.choice.single import single_backends
from ...cache.rows import Candidate, Timing
from ..wording import range_text


def single_lines(candidates: Sequence[Candidate]) -> list[str]:
    """What one backend for all routed experts costs against the fastest of each bucket."""
    if not any(c.bucket.groups > 1 for c in candidates):
        return []
    traffic = layouts.default(candidates[0].profile)
    found = single_backends(candidates, traffic)
    head = "One backend for all routed experts"
    if not found:
        return [f"{head}: none is safe wherever tokens of the traffic {traffic.name} were probed"]
    best, *others = found
    loss = f"{best.loss_percent:.1f} % slower than the fastest of each bucket"
    lines = [f"{head}: {best.backend}, {loss}, weighed by the traffic {traffic.name}"]
    return lines + [f"  {each.backend}: {each.loss_percent:.1f} % slower" for each in others]


def law_lines(timings: Iterable[Timing]) -> list[str]:
    """Microseconds of routed experts under each routing law."""
    rows = [row for row in timings if row.bucket.groups > 1 and row.detail.get("laws")]
    rows.sort(key=lambda row: (row.backend, row.bucket.n, row.bucket.k, row.bucket.m_lo))
    lines = ["By routing law, in microseconds:"] if rows else []
    for row in rows:
        laws = ", ".join(f"{law} {us:.1f}" for law, us in row.detail["laws"].items())
        tokens = range_text(row.bucket.m_lo, row.bucket.m_hi)
        place = f"{row.bucket.n}x{row.bucket.k}"
        lines.append(f"  {row.backend}, {place}, {tokens} tokens: {laws}")
    return lines
