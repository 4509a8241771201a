"""Rows in a few words, the same on a terminal and on a page."""

from __future__ import annotations

from collections.abc import Mapping

from ..cache.experts import layer_words
from ..cache.measured import Measured, measured
from ..cache.rows import BucketKey, Candidate, LayerKey, Timing
from ..engines import names
from ..words import experts_key

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


def weights_text(activation: str) -> str:
    """``W4A16`` or ``W4A4``; of routed experts what is between their GEMMs, as in ``experts
    (swiglu-oai)``."""
    key = experts_key(activation)
    if key is None:
        return WEIGHTS.get(activation, activation)
    scaled = "" if key.scaling == 1 else f", scaled by {key.scaling:g}"
    return f"experts ({key.gate}{scaled})"


def layer_text(bucket: BucketKey) -> str:
    """As in ``nvfp4 W4A16 bf16``, or ``mxfp4 experts (swiglu-oai) bf16, 32 of which 4 a token``."""
    text = f"{bucket.format} {weights_text(bucket.activation)} {bucket.out_dtype}"
    key = experts_key(bucket.activation)
    if key is not None:
        return f"{text}, {bucket.groups} of which {key.top_k} a token"
    return text if bucket.groups == 1 else f"{text}, {bucket.groups} experts"


def size_text(layer: BucketKey | LayerKey) -> str:
    """``n=4096 k=2048``, or ``32 experts, 4 a token, 2880x2880``."""
    return layer_words({name: getattr(layer, name) for name in ("activation", "groups", "n", "k")})


def law_times(timing: Timing) -> dict[str, Measured]:
    """Of routed experts: the time under each routing law; empty without any. Stores of the first
    probes of experts have medians alone."""
    stored = timing.detail.get("laws")
    found = {}
    for law, value in stored.items() if isinstance(stored, Mapping) else ():
        if isinstance(value, Mapping):
            time = measured(value.get("median_us"), value.get("lo_us"), value.get("hi_us"))
        else:
            time = measured(value, None, None) if isinstance(value, int | float) else None
        if time is not None:
            found[str(law)] = time
    return found


def scope_text(arch: str, gpu: str, profile: str) -> str:
    return f"{gpu} ({arch}), profile {profile}"
