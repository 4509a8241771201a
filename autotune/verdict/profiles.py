"""Engine profiles: which regimes must pass, and what a failure elsewhere demands of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from ...cache.rows import BucketKey
from ...words import Condition, experts_key

ONE_STREAM = Condition(
    "one-stream-per-layer", "a layer's weight is never used on two streams at once"
)
"""What an engine that launches each layer on one stream grants."""
ONE_THREAD = Condition(
    "one-thread-at-a-time", "no two host threads call the backend at the same time"
)
WHOLE_ROWS = Condition(
    "whole-rows", "activations are contiguous rows, starting where a row of their buffer starts"
)
OWN_GPU = Condition("gpu-of-its-own", "no other process computes on the GPU")
BELOW_2_31 = Condition("below-2-31", "m*n and m*k are below 2^31")
WITHOUT_FORM = Condition(
    "regimes-without-experts", "nothing shows in the regimes that have no form for routed experts"
)
"""What a verdict on routed experts rests on until each regime has one."""
LEFT_OUT = Condition(
    "regimes-left-out", "nothing shows in the regimes that the probe's level leaves out"
)
"""What a verdict rests on where a required regime was not run on purpose."""


@dataclass(frozen=True, slots=True)
class ExpertsDefault:
    """What an engine takes for routed experts on these SMs: of a format, and of a gate where it is
    one model's (``swiglu-oai`` is gpt-oss's, ``swiglu-10`` DeepSeek V4's); None: of any."""

    sms: tuple[int, ...]
    format: str
    gate: str | None
    backend: str

    def fits(self, sm: int | None, format_: str, gate: str) -> bool:
        return sm in self.sms and format_ == self.format and self.gate in (None, gate)


@dataclass(frozen=True, slots=True)
class Profile:
    """How an engine launches. A regime it never uses may fail, under a condition."""

    name: str
    required: tuple[str, ...]
    conditions: dict[str, Condition]
    """By regime: what the engine must grant for a failure there not to matter."""
    about: str
    defaults: tuple[tuple[tuple[int, ...], str], ...] = ()
    """What the engine takes by itself in W4A16 or W4A4, by SM, in the versions named below."""
    experts: tuple[ExpertsDefault, ...] = ()
    """What it takes by itself for routed experts, in the same versions; the first that fits."""
    traffic: str = "mixed"
    """The distribution of m that layouts are weighed by, unless another is given."""
    crossing: bool = False
    """Whether W4A16 and W4A4 compete for a layer, though outputs differ: an engine that takes an
    NVFP4 checkpoint either way allows it."""

    def default(self, sm: int | None) -> str | None:
        """The backend this engine would take on that SM without advice; None if unknown."""
        return next((backend for sms, backend in self.defaults if sm in sms), None)

    def default_of(self, sm: int | None, bucket: BucketKey) -> str | None:
        """The same for the layer that a bucket is of."""
        key = experts_key(bucket.activation)
        if key is None:
            return self.default(sm)
        fits = (each for each in self.experts if each.fits(sm, bucket.format, key.gate))
        return next((each.backend for each in fits), None)


_ENGINE = (
    "serial",
    "graph",
    "side-stream",
    "pdl-raw",
    "pdl-war",
    "pdl-waw",
    "mlp-chain",
    "rewrite",
    "padding",
    "off-bucket",
    "own-quantiser",
    "returned",
    "addresses",
    "weights",
    "effects",
    "callers",
    "scratch",
    "history",
    "churn",
    "regrow",
    "shared-expert",
)
_EVERY = (
    *_ENGINE,
    "streams",
    "graph-streams",
    "threads",
    "first-calls",
    "strided",
    "neighbours",
)
_HUGE = {"huge": BELOW_2_31}
"""Of no bucket's own problems, so required by none: what it shows bounds every bucket."""
_ONE_STREAM = {
    "streams": ONE_STREAM,
    "graph-streams": ONE_STREAM,
    "threads": ONE_THREAD,
    "first-calls": ONE_THREAD,
    "strided": WHOLE_ROWS,
    "neighbours": OWN_GPU,
    **_HUGE,
}

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("strict", _EVERY, _HUGE, "every regime must pass"),
        Profile(
            "sglang",
            _ENGINE,
            _ONE_STREAM,
            "CUDA graphs, one stream a layer",
            # SGLang 0.5.23
            (
                ((80, 86, 89, 90), "marlin"),
                ((100, 103), "flashinfer-cute-dsl"),
                ((110, 120, 121), "flashinfer-cutlass"),
            ),
            (
                ExpertsDefault((80, 86, 89, 90), "nvfp4", None, "marlin-experts"),
                ExpertsDefault((90,), "mxfp4", "swiglu-oai", "triton-kernels"),
                ExpertsDefault((90,), "mxfp4", "swiglu-10", "flashinfer-cutlass-experts"),
            ),
            crossing=True,
        ),
        # vLLM 0.33, with humming-kernels installed
        Profile(
            "vllm",
            _ENGINE,
            _ONE_STREAM,
            "CUDA graphs, one stream a layer",
            (((90,), "humming"),),
            (
                ExpertsDefault((90,), "nvfp4", None, "humming-indexed"),
                ExpertsDefault((90,), "mxfp4", "swiglu-oai", "vllm-ogs"),
                ExpertsDefault((90,), "mxfp4", "swiglu-10", "humming-indexed"),
            ),
            crossing=True,
        ),
    )
}


def installed() -> str:
    """The profile of the installed engine, else ``strict``; with both engines, ``strict``."""
    from importlib.util import find_spec

    found = [name for name in ("sglang", "vllm") if find_spec(name) is not None]
    return found[0] if len(found) == 1 else "strict"
