"""FlashInfer's autotuner: what a call would launch, and which tactic it is to launch.

FlashInfer's functions build their runners in private functions that differ between versions, so
they are left to do that and met where they ask the autotuner for a tactic.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class InterruptedCall(Exception):
    """Carries a runner and its inputs out of an interrupted call."""

    def __init__(self, runner: Any, inputs: list[Any]) -> None:
        super().__init__()
        self.runner = runner
        self.inputs = inputs


_interrupting = threading.Lock()
_pins = threading.local()


def tuner() -> Any:
    """FlashInfer's autotuner, one a process."""
    return importlib.import_module("flashinfer.autotuner").AutoTuner.get()


def interrupted(function: Callable[..., Any], call: Mapping[str, Any]) -> InterruptedCall | None:
    """The runner that ``function(**call)`` would launch first, and its inputs; None where none is
    tuned.

    Calls of other threads in the meantime go to the autotuner as ever.
    """
    found = tuner()
    me = threading.get_ident()
    original, own = found.choose_one, vars(found).get("choose_one")

    def interrupt(op: str, runners: Any, config: Any, inputs: Any, **rest: Any) -> Any:
        if threading.get_ident() != me:
            return original(op, runners, config, inputs, **rest)
        raise InterruptedCall(runners[0], inputs)

    with _interrupting:
        found.choose_one = interrupt
        try:
            function(**call)
        except InterruptedCall as chosen:
            return chosen
        finally:
            if own is None:
                del found.choose_one
            else:
                found.choose_one = own
    return None


@contextmanager
def pinned(tactics: Mapping[str, Any]) -> Iterator[None]:
    """Have the calls of this thread run these tactics, by the autotuner's name of the operation.

    For functions that take no tactic as an argument. The first use of a process puts a method of
    ours in front of the autotuner's, which asks that one for all that is not pinned.
    """
    _stand_in_front()
    before = getattr(_pins, "tactics", None)
    _pins.tactics = tactics
    try:
        yield
    finally:
        _pins.tactics = before


def _stand_in_front() -> None:
    found = tuner()
    with _interrupting:
        if getattr(found.choose_one, "of_fp4tune", False):
            return
        original = found.choose_one

        def choose(op: str, runners: Any, config: Any, inputs: Any, **rest: Any) -> Any:
            mine = getattr(_pins, "tactics", None)
            if mine is not None and op in mine:
                return runners[0], mine[op]
            return original(op, runners, config, inputs, **rest)

        choose.of_fp4tune = True  # type: ignore[attr-defined]
        found.choose_one = choose
