"""Engine profiles: which regimes must pass, and what a failure elsewhere demands of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from ..probes.data import Condition

ONE_STREAM = Condition(
    "one-stream-per-layer", "a layer's weight is never used on two streams at once"
)
"""What an engine that launches each layer on one stream grants."""


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

    def default(self, sm: int | None) -> str | None:
        """The backend this engine would take on that SM without advice; None if unknown."""
        return next((backend for sms, backend in self.defaults if sm in sms), None)


_EVERY = ("serial", "graph", "streams", "graph-streams", "side-stream")
_ENGINE = ("serial", "graph", "side-stream")
_ONE_STREAM = {"streams": ONE_STREAM, "graph-streams": ONE_STREAM}

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("strict", _EVERY, {}, "every regime must pass"),
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
        ),
        # vLLM 0.33, with humming-kernels installed
        Profile(
            "vllm", _ENGINE, _ONE_STREAM, "CUDA graphs, one stream a layer", (((90,), "humming"),)
        ),
    )
}


def installed() -> str:
    """The profile of the installed engine, else ``strict``; with both engines, ``strict``."""
    from importlib.util import find_spec

    found = [name for name in ("sglang", "vllm") if find_spec(name) is not None]
    return found[0] if len(found) == 1 else "strict"
