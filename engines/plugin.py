"""What both engines' plugins share: how far they may go, what to apply, one line said about it."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence

from ..cache import gpulock, state
from ..cache import reader as reading
from ..cache.errors import Missing
from ..cache.gpulock import Share
from ..errors import Refused
from . import applied, here, holding, installed, pinning, select, serving
from .notice import guarded, say_once
from .select import Selection
from .serving import ServedModel

__all__ = ["APPLIED", "CACHE", "advice", "guarded", "pinned_tactics", "run", "say_once"]

CACHE = pinning.CACHE
APPLIED = "FP4TUNE_APPLIED"
"""Set for an engine's child processes: ``1`` where the option was left at auto, ``0`` where the
user said what to run, and the number of the process that only said what it would."""
APPLIED_EXPERTS = "FP4TUNE_APPLIED_EXPERTS"
"""The same of routed experts."""
_TOLD = "told by "


@functools.lru_cache(maxsize=8)
def selection(engine: str) -> Selection:
    """What `engine` should run here, decided once per process from the generation that all of its
    processes pin. Raises StateError, Refused."""
    reader = select.open_for(engine, pin=True)
    os.environ.setdefault(reading.VARIABLE, str(reader.generation))
    return select.select(reader, engine, home=installed.home(engine, acts=True))


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
    single = found.experts.of(found.backend) if found.experts else None
    if single is not None:
        text += f"; {single.loss_percent:.1f} % slower than the fastest of each bucket"
    if found.held is not None and found.held.by in (holding.PLUGIN, holding.BY_RULE):
        text += f"; {found.held}"
    if found.default and found.default != found.backend:
        text += f"; default {found.default}"
    if found.conditions:
        text += "; if " + ", and ".join(c["text"] for c in found.conditions)
    return text + ")"


def experts_advice(engine: str, model: ServedModel) -> Selection | None:
    """The selection to apply to a model's routed experts, or None: where it has none in FP4 without
    a word, else after saying in one line why there is nothing to."""
    try:
        found = serving.experts_selection(engine, model)
    except (Missing, ValueError, Refused) as error:
        say_once(f"fp4tune leaves the experts of {model.name} to {engine}: {error}")
        return None
    if found is not None and found.backend is None:
        why = "; ".join(f"{name}: {why}" for name, why in sorted(found.rejected.items()))
        say_once(f"fp4tune: nothing that {engine} can name is proven for its experts ({why})")
        return None
    return found


def left_alone(engine: str, option: str, value: object, asked: Sequence[str] = ()) -> None:
    """Say that the user's own option stands, and what speaks against what was `asked` so (as
    arguments); and tell the engine's other processes."""
    os.environ[APPLIED] = "0"
    _say_left(engine, option, value, _against(engine, asked))


def contradicted(engine: str, found: Selection) -> bool:
    """Whether the user's environment says otherwise than a selection does: then that stands, and it
    is said."""
    for variable, value in found.setting.env.items():
        if os.environ.get(variable, value) != value:
            os.environ[APPLIED_EXPERTS] = "0"
            _say_left(engine, variable, os.environ[variable], None)
            return True
    return False


def experts_left_alone(
    engine: str, model: ServedModel, option: str, value: object, asked: Sequence[str]
) -> None:
    """The same of a model's routed experts."""
    os.environ[APPLIED_EXPERTS] = "0"
    against = None
    try:
        found = serving.experts_selection(engine, model)
        document = applied.assess(found, asked) if found is not None else None
        if document is not None and not document["safe"] and document["runs"]:
            against = str(document["why"])
    except Exception:
        against = None  # nothing is known of them
    _say_left(engine, option, value, against)


def _say_left(engine: str, option: str, value: object, against: str | None) -> None:
    text = f"fp4tune: {engine} keeps {option}={value}, which was asked for"
    if against:
        text += f" and is not proven here: {against}"
    say_once(text, logging.WARNING if against else logging.INFO)


def _against(engine: str, asked: Sequence[str]) -> str | None:
    """Why what the engine runs as it was asked is not proven; None where it is, or is not known."""
    try:
        document = applied.assess(selection(engine), asked)
    except Exception:
        return None
    return None if document["safe"] or not document["runs"] else str(document["why"])


def run(engine: str, would: str, wrap: Callable[[], None]) -> None:
    """What a plugin does in each process of its engine. At level ``off`` nothing; at ``emit`` and
    ``watch`` it says what it `would` run; else it calls `wrap` and pins tactics, and wraps `mm_fp4`
    at ``call``. At ``watch``, and where FP4TUNE_WATCH asks for it, the witness watches.
    """
    level = applied.level()
    if level == "off":
        return
    hold_gpus()
    watch(engine, level)
    if level not in applied.ACTING:
        told = os.environ.get(APPLIED, "")
        if told.startswith(_TOLD) and told != _mine():
            return  # by the process that started this one
        found = advice(engine)
        if found is not None:
            say_once(describe(found, would))
        os.environ[APPLIED] = _mine()
        return
    wrap()
    pinned_tactics()
    pin_the_proven(engine)
    if level == "call":
        from . import per_call

        per_call.install()


@guarded
def watch(engine: str, level: str) -> None:
    """Have the witness watch what `engine` runs, where that is asked for."""
    from . import watching

    if watching.wanted(level):
        watching.install(engine)


def only_watches() -> bool:
    """Whether the plugin watches in this process and changes nothing of what its engine runs."""
    from . import watching

    level = applied.level()
    return watching.wanted(level) and level not in applied.ACTING


def _mine() -> str:
    return f"{_TOLD}{os.getpid()}"


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
    pinning.from_files()


@guarded
def pin_the_proven(engine: str) -> None:
    """Have FlashInfer's tuner hold the proven tactics of this store, once it is first asked."""
    if os.environ.get(CACHE):
        return
    try:
        found = selection(engine)
    except Exception:
        return  # said by whoever fills in the backend
    pinning.when_asked(found)
