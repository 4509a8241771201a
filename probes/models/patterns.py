"""Names of modules against the patterns of quantisation configs.

Producers write one list in several ways: whole names, parts of names, globs, ``re:`` expressions,
with and without the ``language_model.`` that a multimodal wrapper puts before. A pattern without
wildcards names a module and all that is inside it; a glob likewise.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Iterable
from typing import Any

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?=$|\.|\*)")
_WRAPPER = re.compile(r"^(?:model\.|language_model\.)+")
_LONGEST = 1000
_MOST_DOTS = 5
"""Repeats of any character in one expression: each more may make a match some hundred times as
long."""
_MOST_LAYERS = 4096


class NamePatterns:
    """A list of patterns; `odd` are those that cannot be read.

    Most patterns of a long list are of one layer each: they are kept by layer, so that a module is
    held against a few of them only.
    """

    def __init__(self, patterns: Iterable[object]) -> None:
        self.odd: list[str] = []
        self._names: set[str] = set()
        self._by_layer: dict[str | None, list[re.Pattern[str]]] = {}
        for pattern in patterns:
            if not isinstance(pattern, str) or not pattern or len(pattern) > _LONGEST:
                self.odd.append(str(pattern)[:80])
            elif pattern.startswith("re:"):
                self._add(None, pattern[3:], pattern)
            elif any(c in pattern for c in "*?["):
                found = _LAYER.search(pattern)
                for spelled in {pattern, unwrapped(pattern)}:
                    self._add(found and found.group(1), _glob(spelled), pattern)
            else:
                self._names.add(unwrapped(pattern))

    def __bool__(self) -> bool:
        return bool(self._names or self._by_layer)

    def _add(self, layer: str | None, expression: str, pattern: str) -> None:
        try:
            if pattern.startswith("re:") and not ends_soon(expression):
                raise re.error("it may take for ever")
            self._by_layer.setdefault(layer, []).append(re.compile(expression))
        except (re.error, RecursionError, OverflowError):
            self.odd.append(pattern[:80])

    def match(self, name: str) -> bool:
        """Whether a pattern names this module, or one that it is inside of."""
        plain = unwrapped(name)
        if self._names and any(part in self._names for part in _windows(plain)):
            return True
        found = _LAYER.search(name)
        patterns = self._by_layer.get(None, [])
        if found:
            patterns = patterns + self._by_layer.get(found.group(1), [])
        return any(pattern.match(name) or pattern.match(plain) for pattern in patterns)


def ends_soon(expression: str) -> bool:
    """Whether a match by this expression takes a time that a name's length bounds: within what it
    repeats nothing is left to choose, and few of its repeats are of any character. Raises
    re.error."""
    parser: Any = getattr(re, "_parser", None) or importlib.import_module("sre_parse")
    dots = 0

    def bounded(parts: Any, repeated: bool) -> bool:
        nonlocal dots
        for op, given in parts:
            name = str(op)
            if name.endswith("_REPEAT"):
                least, most, inner = given
                varies, many = int(least) != int(most), int(most) > 1
                if varies and repeated:
                    return False
                dots += many and any(str(each[0]) == "ANY" for each in inner)
                if not bounded(inner, repeated or many):
                    return False
            elif name == "BRANCH":
                if repeated or not all(bounded(each, repeated) for each in given[1]):
                    return False
            elif any(not bounded(each, repeated) for each in _expressions_in(given)):
                return False
        return True

    return bounded(parser.parse(expression), False) and dots <= _MOST_DOTS


def _expressions_in(given: Any) -> list[Any]:
    """The parsed expressions within what an operation is given."""
    every = given if isinstance(given, tuple) else (given,)
    return [each for each in every if type(each).__name__ == "SubPattern"]


def unwrapped(name: str) -> str:
    """`name` without what a model, and a multimodal one around it, put before: the same module is
    ``model.layers.0``, ``language_model.model.layers.0`` and ``model.language_model.layers.0``."""
    return _WRAPPER.sub("", name)


def cut_off(patterns: Iterable[object], layers: int) -> list[str]:
    """What a list that was cut off leaves out, as patterns; empty for one that is whole.

    Producers write modules sorted as text: layer 0, 1, 10, 11, ..., 2, 20. Where a module is listed
    for the first layers of that order alone, 10 among them, the list ends too early: nobody leaves
    out layers 0, 1 and 10.
    """
    seen: dict[tuple[str, str], set[int]] = {}
    for pattern in patterns:
        found = _LAYER.search(pattern) if isinstance(pattern, str) else None
        if isinstance(pattern, str) and found and not pattern.startswith("re:"):
            key = (pattern[: found.start(1)], pattern[found.end(1) :])
            seen.setdefault(key, set()).add(int(found.group(1)))
    order = sorted(range(min(layers, _MOST_LAYERS)), key=str)
    return [
        f"{before}*{after}"
        for (before, after), numbers in seen.items()
        if 3 <= len(numbers) < layers and numbers == set(order[: len(numbers)])
    ]


def _glob(pattern: str) -> str:
    # "layers.1*" is layer 1 and what is inside, not layers 10 to 19.
    whole = pattern[:-1] if re.search(r"\d\*$", pattern) else pattern
    return fnmatch.translate(whole)[:-2] + r"(?:\..*)?\Z"  # without the \Z that it ends with


def _windows(name: str) -> Iterable[str]:
    """All runs of whole parts of a dotted name."""
    parts = name.split(".")
    for start in range(len(parts)):
        for stop in range(len(parts), start, -1):
            yield ".".join(parts[start:stop])
