"""Python's own functions and methods, for `evaluate`: pure ones, on known values."""

from __future__ import annotations

import os.path
from collections.abc import Callable
from typing import Any

from .values import CannotTell, ClassOf, External, Given, Made, Member, Unknown, is_known, is_true


class Lifted:
    """A function that calls back into the evaluation: ``function(evaluator, *args, **named)``."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


def _each(evaluator: Any, function: Any, *series: Any) -> Any:
    return [evaluator.apply(function, items, {}) for items in zip(*series, strict=False)]


def _partial_call(evaluator: Any, function: Any, *args: Any, **named: Any) -> Any:
    return Lifted(lambda ev, *more, **last: ev.apply(function, [*args, *more], {**named, **last}))


def _decorator(evaluator: Any, *args: Any, **named: Any) -> Any:
    """``cache`` with a function, or ``lru_cache(maxsize=...)`` without: the function itself."""
    if args and not isinstance(args[0], int):
        return args[0]
    return Lifted(lambda ev, function: function)


def _all(evaluator: Any, values: Any) -> Any:
    return _combined(values, False)


def _any(evaluator: Any, values: Any) -> Any:
    return _combined(values, True)


def _combined(values: Any, decides: bool) -> Any:
    unknown = None
    for value in values if isinstance(values, list | tuple | set | dict) else [Unknown("a list")]:
        try:
            if is_true(value) == decides:
                return decides
        except CannotTell:
            unknown = Unknown("a part")
    return not decides if unknown is None else unknown


def _isinstance(evaluator: Any, value: Any, kind: Any) -> Any:
    if isinstance(value, Unknown | External):
        return Unknown("a type")
    if isinstance(kind, External) and kind.path.startswith("enum."):
        return isinstance(value, Member)
    if isinstance(kind, ClassOf):
        owner = getattr(value, "owner", None)
        if owner is None and (value is None or isinstance(value, str | int | float | list | dict)):
            return False  # a plain value is of no class of the engine's
        return owner is kind if owner is not None else Unknown("a type")
    return isinstance(value, kind) if isinstance(kind, type) else Unknown("a type")


def _hasattr(evaluator: Any, value: Any, name: str) -> Any:
    if value is None:
        return False
    if isinstance(value, Made):
        return name in value.attributes or value.owner.statement(name) is not None
    if isinstance(value, Given):
        return value.has(name)
    return Unknown(f"whether it has {name}")


def _getattr(evaluator: Any, value: Any, name: str, default: Any = None) -> Any:
    found = evaluator.attribute(value, name)
    if isinstance(found, Unknown) and isinstance(value, Made):
        return default
    return found


def _next(evaluator: Any, values: Any, default: Any = None) -> Any:
    return next(iter(values), default) if isinstance(values, list | tuple) else Unknown("next")


def _callable(evaluator: Any, value: Any) -> Any:
    return not isinstance(value, str | int | list | tuple | dict | set | None.__class__)


def _container_of(kind: Callable[..., Any]) -> Lifted:
    """A container's constructor: what it holds may be unknown."""

    def made(evaluator: Any, value: Any = (), **named: Any) -> Any:
        if named:
            return {**dict(value), **named}
        if isinstance(value, list | tuple | set | frozenset | dict):
            return kind(value)
        return kind(value) if isinstance(value, str | range) else Unknown("a container")

    return Lifted(made)


FUNCTIONS: dict[str, Any] = {
    "len": len, "int": lambda *a: int(*a), "str": lambda *a: str(*a), "bool": lambda v: bool(v),
    "min": min, "max": max, "range": lambda *a: list(range(*a)), "sorted": sorted, "sum": sum,
    "abs": abs, "enumerate": lambda v, start=0: [list(p) for p in enumerate(v, start)],
    "zip": lambda *a: [tuple(p) for p in zip(*a, strict=False)], "print": lambda *a, **k: None,
    "reversed": lambda v: list(reversed(v)),
    "list": _container_of(list), "tuple": _container_of(tuple), "set": _container_of(set),
    "frozenset": _container_of(frozenset), "dict": _container_of(dict),
    "all": Lifted(_all), "any": Lifted(_any), "map": Lifted(_each),
    "isinstance": Lifted(_isinstance), "hasattr": Lifted(_hasattr), "getattr": Lifted(_getattr),
    "next": Lifted(_next), "callable": Lifted(_callable),
}  # fmt: skip

NATIVES: dict[str, Any] = {
    "functools.partial": Lifted(_partial_call),
    "functools.lru_cache": Lifted(_decorator),
    "functools.cache": Lifted(_decorator),
    "os.path.join": os.path.join,
    "os.path.dirname": os.path.dirname,
}

_METHODS: dict[type, tuple[str, ...]] = {
    str: (
        "lower", "upper", "strip", "split", "rsplit", "replace", "startswith", "endswith", "join",
        "removeprefix", "removesuffix", "partition", "rpartition", "isdigit", "format", "lstrip",
    ),
    list: ("append", "extend", "insert", "pop", "copy", "index", "remove", "count"),
    dict: ("get", "items", "keys", "values", "copy", "setdefault", "update"),
    set: ("add", "copy", "union", "issubset", "difference", "intersection"),
    frozenset: ("union", "issubset", "difference", "intersection"),
    tuple: ("index", "count"),
}  # fmt: skip


def method(value: Any, name: str) -> Any:
    """A method of a plain value; unknown where it is none of the pure ones."""
    for kind, allowed in _METHODS.items():
        if type(value) is kind and name in allowed:
            return _bound_method(kind, name, getattr(value, name))
    return Unknown(f"a method {name}")


def _bound_method(kind: type, name: str, bound: Callable[..., Any]) -> Any:
    if kind is dict and name in ("items", "keys", "values"):
        return Lifted(lambda evaluator: list(bound()))
    if kind in (list, set, dict):  # what they hold may be unknown
        return Lifted(lambda evaluator, *args, **named: bound(*args, **named))
    return lambda *args, **named: _value_or_unknown(bound(*args, **named))


def _value_or_unknown(value: Any) -> Any:
    return value if is_known(value) else Unknown("a value")
