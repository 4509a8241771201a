"""What an engine's source means when it is evaluated: functions, classes, members, and what is
not known. Standard library only."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .source import SourceModule


class CannotTell(Exception):
    """A decision in the engine's source hangs on something that its source does not say."""


class EngineRefuses(Exception):
    """The engine's source raises here: it does not start so. `kind` is the exception's class by its
    name, as far as that is known."""

    def __init__(self, said: str, kind: str = "") -> None:
        super().__init__(said)
        self.kind = kind


class Unknown:
    """A value that is not known. It may be handed on; to decide by it is `CannotTell`."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __bool__(self) -> bool:
        raise CannotTell(f"it depends on {self.what}")


class Given:
    """A fact of the machine or the configuration, by attribute; what is not given is unknown."""

    def __init__(self, name: str, facts: Mapping[str, Any]) -> None:
        self.name = name
        self.facts = dict(facts)

    @property
    def truth(self) -> bool | None:
        """Whether it counts as true; None where that is not known."""
        return None

    def attribute(self, name: str) -> Any:
        return self.facts[name] if name in self.facts else Unknown(f"{self.name}.{name}")

    def has(self, name: str) -> Any:
        """Whether it has that attribute; unknown where that is."""
        return name in self.facts or Unknown(f"whether {self.name} has {name}")


class SourceFunction:
    """A function or lambda of the source, with the names it closes over."""

    __slots__ = ("closure", "module", "node", "owner")

    def __init__(
        self,
        module: SourceModule,
        node: ast.FunctionDef | ast.Lambda,
        closure: Mapping[str, Any],
        owner: ClassOf | None = None,
    ) -> None:
        self.module = module
        self.node = node
        self.closure = closure
        self.owner = owner

    @property
    def kind(self) -> str:
        """``classmethod``, ``staticmethod``, ``property``, or ``""``."""
        for decorator in getattr(self.node, "decorator_list", ()):
            name = getattr(decorator, "id", getattr(decorator, "attr", ""))
            if name in ("classmethod", "staticmethod", "property", "cached_property"):
                return "property" if name == "cached_property" else str(name)
        return ""


class ClassOf:
    """A class of the source. Compared by identity: there is one for each statement."""

    __slots__ = ("bases", "members", "module", "name", "node")

    def __init__(self, module: SourceModule, node: ast.ClassDef) -> None:
        self.module = module
        self.node = node
        self.name = node.name
        self.bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        self.members: dict[str, Member] = {}

    @property
    def is_enum(self) -> bool:
        return any(base in ("Enum", "IntEnum", "StrEnum") for base in self.bases)

    @property
    def fields(self) -> list[str]:
        """The names that a dataclass's own ``__init__`` takes, in their order; none where the class
        has one that is written out."""
        if self.statement("__init__") is not None:
            return []
        each = [n.target for n in self.node.body if isinstance(n, ast.AnnAssign)]
        return [target.id for target in each if isinstance(target, ast.Name)]

    def statement(self, name: str) -> ast.stmt | None:
        """What the body of the class binds to `name`."""
        found: ast.stmt | None = None
        for each in self.node.body:
            if (
                isinstance(each, ast.FunctionDef)
                and each.name == name
                or isinstance(each, ast.Assign)
                and any(
                    isinstance(target, ast.Name) and target.id == name for target in each.targets
                )
            ):
                found = each
            elif isinstance(each, ast.AnnAssign) and getattr(each.target, "id", None) == name:
                found = each if each.value is not None else found
        return found


class Member:
    """A member of an enumeration. There is one object for each."""

    __slots__ = ("name", "owner", "value")

    def __init__(self, owner: ClassOf, name: str, value: Any) -> None:
        self.owner = owner
        self.name = name
        self.value = value


class Made:
    """An object of a class of the source, by the attributes that were set on it."""

    __slots__ = ("attributes", "owner")

    def __init__(self, owner: ClassOf, attributes: Mapping[str, Any]) -> None:
        self.owner = owner
        self.attributes = dict(attributes)


class BoundMethod:
    """A method with what it is called on."""

    __slots__ = ("code", "on")

    def __init__(self, code: SourceFunction, on: Any) -> None:
        self.code = code
        self.on = on


class Parent:
    """What ``super()`` is in a method of the class `owner`, called on `on`."""

    __slots__ = ("on", "owner")

    def __init__(self, owner: ClassOf, on: Any) -> None:
        self.owner = owner
        self.on = on


@dataclass(frozen=True, slots=True)
class External:
    """A name of another package, by its dotted path; the same path is the same."""

    path: str


Native = Callable[..., Any]
"""A function of ours that stands for one the source calls."""


def is_true(value: Any) -> bool:
    """Truth as Python has it. Raises CannotTell for what is not known."""
    if isinstance(value, Given) and value.truth is not None:
        return value.truth
    if isinstance(value, External | Given):
        name = value.path if isinstance(value, External) else value.name
        raise CannotTell(f"it depends on {name}")
    return bool(value)


def is_known(value: Any) -> bool:
    """Whether a value, and all it holds, is known."""
    if isinstance(value, Unknown | External):
        return False
    if isinstance(value, list | tuple | set | frozenset):
        return all(is_known(each) for each in value)
    if isinstance(value, dict):
        return all(is_known(k) and is_known(v) for k, v in value.items())
    return True
