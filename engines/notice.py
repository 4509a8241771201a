"""What fp4tune says inside an engine: each sentence once, in the engine's own log.

A plugin must never stop an engine from starting: whatever goes wrong is logged once, and the engine
goes on as it would have without fp4tune. Standard library only.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from ..cache.errors import Missing
from ..errors import printable
from .names import ENGINES

log = logging.getLogger("fp4tune")


@functools.lru_cache(maxsize=256)
def say_once(sentence: str, severity: int = logging.INFO) -> None:
    """Say a sentence, once in a process, where the engine's own lines go: to its handlers, or to
    stderr while it has none. Engines load plugins before they configure their log."""
    sentence = printable(sentence)
    if _join_the_engine():
        log.log(severity, "%s", sentence)
    elif severity > logging.DEBUG:
        print(f"{logging.getLevelName(severity)} {sentence}", file=sys.stderr, flush=True)


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


def _join_the_engine() -> bool:
    """Send our lines to the handlers of the engine's logger, else to the root's; whether anything
    handles them then. vLLM configures a logger of its own and no root; SGLang the root, and some
    of what it imports does so before it, without a level."""
    if log.handlers:
        return True
    for name in ENGINES:
        engine = logging.getLogger(name)
        if engine.handlers:
            for handler in engine.handlers:
                log.addHandler(handler)
            log.setLevel(engine.level or logging.INFO)
            log.propagate = False
            return True
    root = logging.getLogger()
    if root.handlers and log.level == logging.NOTSET and root.level == logging.WARNING:
        log.setLevel(logging.INFO)  # the level that Python begins with is nobody's wish
    return bool(root.handlers)
