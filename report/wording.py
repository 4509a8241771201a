"""Rows in a few words, the same on a terminal and on a page."""

from __future__ import annotations

from ..cache.rows import BucketKey, Candidate

WEIGHTS = {"bf16": "W4A16", "fp4": "W4A4"}
"""What the field calls a GEMM, by its activation."""


def reference_line(candidate: Candidate) -> bool:
    """Whether it was measured to compare with, and is no candidate."""
    return any("reference line" in str(reason) for reason in candidate.reasons)


def verdict_word(candidate: Candidate) -> str:
    """A candidate's verdict; a reference line is never judged, so its verdict is not a mark against
    it."""
    return "reference" if reference_line(candidate) else candidate.verdict


def range_text(lo: int, hi: int, dash: str = "-") -> str:
    """As in ``16`` or ``17-64``."""
    return str(hi) if lo == hi else f"{lo}{dash}{hi}"


def layer_text(bucket: BucketKey) -> str:
    """As in ``nvfp4 W4A16 bf16``."""
    weights = WEIGHTS.get(bucket.activation, bucket.activation)
    text = f"{bucket.format} {weights} {bucket.out_dtype}"
    return text if bucket.groups == 1 else f"{text}, {bucket.groups} groups"


def scope_text(arch: str, gpu: str, profile: str) -> str:
    return f"{gpu} ({arch}), profile {profile}"
