"""What both engines' plugins share: how far they may go, what to apply, one line said about it.

A plugin must never stop an engine from starting: whatever goes wrong is logged once, and the engine
goes on as it would have without fp4tune.
"""

from __future__ import annotations

import functools
import logging
import os

from ..cache import gpulock, state
from ..cache import reader as reading
from ..cache.errors import Missing
from ..errors import printable
from . import applied, here, select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..cache.gpulock import Share
    from .select import Selection

log = logging.getLogger("fp4tune")

CACHE = "FP4TUNE_FLASHINFER_CACHE"
"""The autotune cache that ``fp4tune emit flashinfer`` wrote."""
APPLIED = "FP4TUNE_APPLIED"
"""Set for an engine's child processes: ``1`` where the option was left at auto, ``0`` where the
user said what to run."""


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but that it logs in one line whatever it would raise, and returns None."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            text = f"fp4tune does nothing here: {type(error).__name__}: {error}".splitlines()[0]
            # That nobody has probed yet is nothing to be warned of at every start.
            say_once(text, logging.INFO if isinstance(error, Missing) else logging.WARNING)
            return None

    return run


@functools.lru_cache(maxsize=256)
def say_once(sentence: str, severity: int = logging.INFO) -> None:
    log.log(severity, "%s", printable(sentence))


@functools.lru_cache(maxsize=8)
def selection(engine: str) -> Selection:
    """What `engine` should run here, decided once per process from the generation that all of its
    processes pin. Raises StateError."""
    reader = select.open_for(engine, pin=True)
    os.environ.setdefault(reading.VARIABLE, str(reader.generation))
    return select.select(reader, engine)


def advice(engine: str) -> Selection | None:
    """The selection to apply, or None after saying in one line why there is nothing to."""
    found = selection(engine)
    if found.backend is None:
        why = "; ".join(f"{name}: {why}" for name, why in sorted(found.rejected.items()))
        say_once(f"fp4tune: nothing that {engine} can name is proven here ({why})")
        return None
    return found


def describe(found: Selection, did: str) -> str:
    """The line that says what was done, and on what evidence."""
    text = (
        f"fp4tune: {did} {found.word} ({found.backend}: safe in {len(found.buckets)} buckets on "
        f"{found.gpu}, generation {found.generation}"
    )
    if found.default and found.default != found.backend:
        text += f"; default {found.default}"
    if found.conditions:
        text += "; if " + ", and ".join(c["text"] for c in found.conditions)
    return text + ")"


def left_alone(engine: str, option: str, value: object) -> None:
    """Say that the user's own option stands, and tell the engine's other processes."""
    os.environ[APPLIED] = "0"
    say_once(f"fp4tune: {engine} keeps {option}={value}, which was asked for")


def run(engine: str, would: str, wrap: Callable[[], None]) -> None:
    """What a plugin does in each process of its engine. At level ``off`` nothing; at ``emit`` it
    says what it `would` run; else it calls `wrap` and pins tactics, and wraps `mm_fp4` at ``call``.
    """
    level = applied.level()
    if level == "off":
        return
    hold_gpus()
    if level == "emit":
        found = advice(engine)
        if found is not None:
            say_once(describe(found, would))
        return
    wrap()
    pinned_tactics()
    if level == "call":
        from . import per_call

        per_call.install()


@functools.lru_cache(maxsize=1)
@guarded
def hold_gpus() -> Share | None:
    """Hold this process's GPUs for as long as it lives: no probe begins on them, and one that runs
    ends within a second. None where there is no state directory, or no GPU."""
    places = state.holding_places()
    uuids = here.uuids() if places else []
    if not uuids:
        return None
    held = gpulock.share(places[0], uuids)
    for uuid, why in held.problems.items():
        say_once(f"fp4tune: {uuid} is not held against probes: {why}", logging.WARNING)
    return held


@guarded
def pinned_tactics() -> None:
    """Give FlashInfer's tuner the proven tactics that ``fp4tune emit flashinfer`` wrote, where the
    environment names both files: FP4TUNE_FLASHINFER_CACHE and FLASHINFER_TACTICS_BLOCKLIST."""
    cache, blocklist = os.environ.get(CACHE), os.environ.get("FLASHINFER_TACTICS_BLOCKLIST")
    if not cache:
        return
    if not blocklist:
        raise ValueError(f"{CACHE} is set and FLASHINFER_TACTICS_BLOCKLIST is not: both, or none")
    from flashinfer.autotuner import AutoTuner

    if AutoTuner.get().load_configs(cache):
        say_once(f"fp4tune: FlashInfer runs the tactics of {cache}")
    else:
        say_once(f"fp4tune: FlashInfer refuses {cache}: made for another environment")
