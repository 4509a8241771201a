"""Holding FlashInfer's tuner to the proven tactics, inside an engine's process.

`AutoTuner.choose_one` is asked for a runner and a tactic at every call of `mm_fp4`, whether a
tuning pass is under way or not; what it answers is what runs. So the answer for a proven bucket is
given in front of it, and everything else is FlashInfer's own: other operators, other layouts,
shapes that were not probed. Files that FlashInfer loads itself (`tactics`) can be measured over by
a tuning pass under another policy, and know FlashInfer's buckets only.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..cache.decision import TACTIC
from ..words import tuples
from .asked import Configured
from .names import NAMES
from .notice import guarded, say_once
from .select import Bucket, Selection

CACHE = "FP4TUNE_FLASHINFER_CACHE"
"""The autotune cache that ``fp4tune emit flashinfer`` wrote."""
BLOCKLIST = "FLASHINFER_TACTICS_BLOCKLIST"
OP = "fp4_gemm"
FALLBACK = -1
"""FlashInfer's own default tactic; what `fp4tune probe` calls ``default``."""

_TUNER, _GEMM = "flashinfer.autotuner", "flashinfer.gemm.gemm_base"
_CONFIG = "_MM_FP4_TUNING_CONFIG_128x4"
_A, _B, _OUT_DTYPE, _BLOCK = 0, 1, 5, 7
"""Where the activation, the weight, the output's dtype and the block are in the tuner's inputs."""
_BLOCKS = {"nvfp4": 16, "mxfp4": 32}


class PinnedTactics:
    """The proven tactic of each bucket, by FlashInfer's runner and the shape of the weight."""

    def __init__(self) -> None:
        self._layers: dict[tuple[str, int, int], tuple[list[int], list[int], list[Any]]] = {}
        self.backends: list[str] = []
        self.beyond_default = False
        """Whether a tactic is among them that the library does not take by itself."""

    def add(self, backend: str, buckets: Sequence[Bucket]) -> None:
        """Pin `backend` in these buckets. Raises ValueError for what is no tactic of FlashInfer."""
        runner = NAMES[backend].runner
        if runner is None:
            return
        self.backends.append(backend)
        for n, k, m_lo, m_hi, decision in sorted(buckets, key=lambda b: b[:4]):
            lows, highs, tactics = self._layers.setdefault((runner, n, k), ([], [], []))
            lows.append(m_lo)
            highs.append(m_hi)
            tactics.append(value(decision.tactic))
            self.beyond_default |= tactics[-1] != FALLBACK

    def find(self, runner: str, m: int, n: int, k: int) -> tuple[Any] | None:
        """The tactic for m rows, in a tuple of one; None where none is proven."""
        layer = self._layers.get((runner, n, k))
        if layer is None:
            return None
        lows, highs, tactics = layer
        at = bisect_left(highs, m)
        return (tactics[at],) if at < len(highs) and lows[at] <= m else None


def value(tactic: str) -> Any:
    """A stored tactic as FlashInfer has it. Raises ValueError for one that is none."""
    if tactic == TACTIC:
        return FALLBACK
    try:
        return tuples(json.loads(tactic))
    except ValueError:
        raise ValueError(f"{tactic!r} is not a FlashInfer tactic") from None


def pins_of(selection: Selection) -> PinnedTactics:
    """What is proven of every backend that the engine may run. Raises ValueError."""
    pins = PinnedTactics()
    every = dict(selection.others)
    if selection.backend is not None:
        every[selection.backend] = selection.buckets
    for backend, buckets in every.items():
        pins.add(backend, buckets)
    return pins


def when_asked(selection: Selection) -> None:
    """Hold FlashInfer's tuner to what `selection` proved, as soon as it is imported here; never
    imports it itself. Raises ValueError."""
    pins = pins_of(selection)
    tuned = selection.home.source.tuned(Configured(tuple(sys.argv[1:]), os.environ))
    if not pins.backends or not (tuned or pins.beyond_default):
        return
    hold = guarded(functools.partial(_hold, pins, selection))
    if _TUNER in sys.modules:
        hold(sys.modules[_TUNER])
    else:
        sys.meta_path.insert(0, _AfterImport(_TUNER, hold))


def wrap(choose_one: Callable[..., Any], pins: PinnedTactics, fmt: str, out: Any) -> Any:
    """`choose_one` with the answers of `pins` for problems of that format and output dtype."""
    block = _BLOCKS[fmt]

    @functools.wraps(choose_one)
    def chosen(
        self: Any, custom_op: str, runners: Any, tuning_config: Any, inputs: Any, **more: Any
    ) -> Any:
        if custom_op == OP and tuning_config is getattr(sys.modules.get(_GEMM), _CONFIG, None):
            try:
                if inputs[_BLOCK] == block and inputs[_OUT_DTYPE] is out:
                    (m, half), n = inputs[_A].shape, inputs[_B].shape[1]
                    for runner in runners:
                        found = pins.find(type(runner).__name__, m, n, 2 * half)
                        if found is not None:
                            return runner, found[0]
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                say_once(f"fp4tune leaves a tactic to FlashInfer: {type(error).__name__}: {error}")
        return choose_one(self, custom_op, runners, tuning_config, inputs, **more)

    chosen.fp4tune_pins = pins  # type: ignore[attr-defined]
    return chosen


def _hold(pins: PinnedTactics, selection: Selection, module: ModuleType) -> None:
    import torch

    tuner = module.AutoTuner
    if hasattr(tuner.choose_one, "fp4tune_pins"):
        return
    tuner.choose_one = wrap(tuner.choose_one, pins, selection.format, torch.bfloat16)
    say_once(
        f"fp4tune: FlashInfer's tuner is held to the proven tactics of "
        f"{', '.join(sorted(pins.backends))} (generation {selection.generation})",
        logging.DEBUG,
    )


class _AfterImport(MetaPathFinder):
    """Calls back when a module has been imported, once."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loading(spec.loader, self._then)
        return spec


class _Loading(Loader):
    """A loader with something to do after it."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def from_files() -> None:
    """Give FlashInfer's tuner the files that the environment names: FP4TUNE_FLASHINFER_CACHE and
    FLASHINFER_TACTICS_BLOCKLIST. Raises ValueError where one of the two is missing."""
    cache, blocklist = os.environ.get(CACHE), os.environ.get(BLOCKLIST)
    if not cache:
        return
    if not blocklist:
        raise ValueError(f"{CACHE} is set and {BLOCKLIST} is not: both, or none")
    tuner = importlib.import_module(_TUNER).AutoTuner
    if tuner.get().load_configs(cache):
        say_once(f"fp4tune: FlashInfer runs the tactics of {cache}")
    else:
        say_once(f"fp4tune: FlashInfer refuses {cache}: made for another environment")
