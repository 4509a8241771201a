"""Rows in a few words, the same on a terminal and on a page."""

from __future__ import annotations

from ..cache.rows import BucketKey, Candidate
from ..engines import names

WEIGHTS = {"bf16": "W4A16", "fp4": "W4A4"}
"""What the field calls a GEMM, by its activation."""


def reference_line(candidate: Candidate) -> bool:
    """Whether it was measured to compare with, and is no candidate."""
    return any("reference line" in str(reason) for reason in candidate.reasons)


def verdict_word(candidate: Candidate) -> str:
    """A candidate's verdict; a reference line is never judged, so its verdict is not a mark against
    it."""
    return "reference" if reference_line(candidate) else candidate.verdict


def without_name(candidate: Candidate) -> str | None:
    """Why a safe candidate is not chosen for the engine of its profile, where that has no name for
    it; None where it may be chosen, or nothing is chosen for an engine."""
    c = candidate
    if c.verdict != "safe" or c.profile not in names.ENGINES or reference_line(c):
        return None
    if names.named(c.profile, c.backend, c.bucket.format, names.sm_of(c.arch)):
        return None
    return f"{c.profile} has no name for it"


def range_text(lo: int, hi: int, dash: str = "-") -> str:
    """As in ``16`` or ``17-64``."""
    return str(hi) if lo == hi else f"{lo}{dash}{hi}"


def layer_text(bucket: BucketKey) -> str:
    """As in ``nvfp4 W4A16 bf16``."""
    weights = WEIGHTS.get(bucket.activation, bucket.activation)
    text = f"{bucket.format} {weights} {bucket.out_dtype}"
    return text if bucket.groups == 1 else f"{text}, {bucket.groups} experts"


def scope_text(arch: str, gpu: str, profile: str) -> str:
    return f"{gpu} ({arch}), profile {profile}"
