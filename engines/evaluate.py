"""An engine's own selection code, evaluated from its source: nothing of it is imported or run.

A small part of Python, with three kinds of values: what the source says, what is given (the SM, the
options, what is installed), and what is unknown. Unknown values are handed on; a decision that
hangs on one raises `CannotTell`, so that nothing is ever claimed of code that is not understood.
Standard library only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import builtin, expressions, statements
from .builtin import Lifted
from .names import ENGINES
from .source import SourceModule, SourceTree, bound_by
from .values import (
    BoundMethod,
    CannotTell,
    ClassOf,
    EngineRefuses,
    External,
    Given,
    Made,
    Member,
    Native,
    Parent,
    SourceFunction,
    Unknown,
    is_known,
    is_true,
)  # fmt: skip

_STEPS = 60_000
"""Expressions and statements looked at in one evaluation, at most."""
_DEEP = 60
_STARRED = re.compile(r"^from [\w.]+ import \*", re.M)


class Evaluator:
    """One evaluation over a `SourceTree`.

    `facts`: bare names that stand for a value whichever module they come from. `natives`: dotted
    paths of functions and values outside the engine.
    """

    def __init__(self, tree: SourceTree, facts: dict[str, Any], natives: Mapping[str, Any]) -> None:
        self.tree = tree
        self.facts = facts
        self.natives = {**builtin.NATIVES, **natives}
        self.globals: dict[tuple[str, str], Any] = {}
        self._steps = 0
        self._depth = 0

    # -- entry points

    def call(self, module: str, function: str, *args: Any, **named: Any) -> Any:
        """The result of a top-level function. Raises CannotTell, EngineRefuses."""
        return self._safely(lambda: self.apply(self.global_value(module, function), args, named))

    def make(self, module: str, name: str, *args: Any, **named: Any) -> Any:
        """An object of a top-level class whose ``__init__`` was evaluated. Raises as `call`."""

        def made() -> Any:
            owner = self.global_value(module, name)
            if not isinstance(owner, ClassOf):
                raise CannotTell(f"{name} is no class")
            one = Made(owner, {})
            init = owner.statement("__init__")
            if isinstance(init, ast.FunctionDef):
                self.apply(
                    BoundMethod(SourceFunction(owner.module, init, {}, owner), one), args, named
                )
            return one

        return self._safely(made)

    def send(self, one: Made, method: str, *args: Any) -> Any:
        """The result of a method of an object. Raises as `call`."""
        return self._safely(lambda: self.apply(self.attribute(one, method), args, {}))

    def ask(self, module: str, name: str, method: str) -> Any:
        """The result of a class's own method without arguments. Raises as `call`."""
        return self._safely(
            lambda: self.apply(self.attribute(self.global_value(module, name), method), (), {})
        )

    def known(self, module: str, name: str) -> Any:
        """What a top-level name is, perhaps unknown."""
        return self._safely(lambda: self.global_value(module, name))

    def value(self, module: str, name: str) -> Any:
        """What a top-level name is. Raises CannotTell where that is not known."""

        def found() -> Any:
            value = self.global_value(module, name)
            if not is_known(value):
                raise CannotTell(f"{module}.{name} is not known")
            return value

        return self._safely(found)

    def expression(self, module: str, node: ast.expr) -> Any:
        """What an expression in the scope of `module` is. Raises as `call`."""
        place = self.tree.module(module)
        if place is None:
            raise CannotTell(f"{module} cannot be read")
        return self._safely(lambda: self.eval(node, place, {}))

    def _safely(self, what: Any) -> Any:
        try:
            return what()
        except (CannotTell, EngineRefuses):
            raise
        except (statements.Returned, statements.Left, RecursionError):
            raise CannotTell("its source is not understood") from None
        except Exception as error:  # what is not supported, or types that do not fit
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CannotTell(f"its source is not understood ({said})") from None

    # -- names

    def global_value(self, module: str, name: str) -> Any:
        if name in self.facts:
            return self.facts[name]
        if (module, name) in self.globals:
            return self.globals[module, name]
        place = self.tree.module(module)
        if place is None:
            return Unknown(f"{module}.{name}")
        value: Any = Unknown(f"{module}.{name}")
        for statement in place.binding(name):
            value = self._bind(statement, name, place, value)
        self.globals[module, name] = value
        return value

    def _bind(self, statement: ast.stmt, name: str, module: SourceModule, before: Any) -> Any:
        """What `name` is after a statement at the top of a module."""
        if isinstance(statement, ast.FunctionDef):
            return SourceFunction(module, statement, {})
        if isinstance(statement, ast.ClassDef):
            return ClassOf(module, statement)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            return self.imported(statement, name, module)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            value = self.eval(statement.value, module, {})
            if isinstance(target, ast.Name):
                return value
            scope: dict[str, Any] = {}
            statements.assign(self, target, value, module, scope)
            return scope.get(name, before)
        if isinstance(statement, ast.If):
            if ast.unparse(statement.test).endswith("TYPE_CHECKING"):
                return before
            branch = statement.body
            if not is_true(self.eval(statement.test, module, {})):
                branch = statement.orelse
        elif isinstance(statement, ast.Try):
            branch = self.attempted(statement, module)
        else:
            branch = getattr(statement, "body", [])
        for each in branch:
            if name in bound_by(each):
                before = self._bind(each, name, module, before)
        return before

    def attempted(self, statement: ast.Try, module: SourceModule) -> list[ast.stmt]:
        """What of a ``try`` is run: its body, or its handler where an import of it fails."""
        for each in statement.body:
            if isinstance(each, ast.ImportFrom) and not self._is_there(each, module):
                return statement.handlers[0].body if statement.handlers else []
            if isinstance(each, ast.Import) and not all(
                self.tree.python.has_module(alias.name) for alias in each.names
            ):
                return statement.handlers[0].body if statement.handlers else []
        return [*statement.body, *statement.orelse]

    def _is_there(self, statement: ast.ImportFrom, module: SourceModule) -> bool:
        path = _absolute_name(statement, module)
        if not self.tree.python.has_module(path):
            return False
        source = self.tree.module(path)
        return source is None or all(
            source.binding(alias.name) or self.tree.python.has_module(f"{path}.{alias.name}")
            for alias in statement.names
        )

    def imported(
        self, statement: ast.Import | ast.ImportFrom, name: str, module: SourceModule
    ) -> Any:
        for alias in statement.names:
            if (alias.asname or alias.name.partition(".")[0]) != name:
                continue
            if isinstance(statement, ast.Import):
                path = alias.name if alias.asname else name
                return self._external(path)
            path = _absolute_name(statement, module)
            if alias.name in self.facts:
                return self.facts[alias.name]
            source = self.tree.module(path) if _of_one_package(path, module.name) else None
            if source is not None and source.binding(alias.name):
                return self.global_value(path, alias.name)
            starred = self._starred(source, alias.name) if source is not None else None
            if starred is not None:
                return self.global_value(starred, alias.name)
            return self._external(f"{path}.{alias.name}")
        return Unknown(name)

    def _starred(self, source: SourceModule, name: str) -> str | None:
        """The module that a name comes from by ``from ... import *``; None where it does not."""
        for found in _STARRED.finditer(source.text):
            statement = ast.parse(found[0]).body[0]
            assert isinstance(statement, ast.ImportFrom)
            path = _absolute_name(statement, source)
            place = self.tree.module(path) if _of_one_package(path, source.name) else None
            if place is not None and place.binding(name):
                return path
        return None

    def _external(self, path: str) -> Any:
        if path in self.natives:
            return self.natives[path]
        last = path.rpartition(".")[2]
        return self.facts.get(last, External(path))

    # -- values

    def eval(self, node: ast.expr, module: SourceModule, scope: dict[str, Any]) -> Any:
        """What an expression is; unknown where its kind is not understood."""
        self.step()
        kind = expressions.KINDS.get(type(node))
        if kind is None:
            return Unknown(ast.unparse(node)[:60])
        return kind(self, node, module, scope)

    def step(self) -> None:
        """Count one thing looked at. Raises CannotTell when there were too many."""
        self._steps += 1
        if self._steps > _STEPS:
            raise CannotTell("its source takes too long to follow")

    def attribute(self, value: Any, name: str) -> Any:
        """``value.name``, as the source would see it."""
        if isinstance(value, External):
            return self._external_attribute(value, name)
        if isinstance(value, Given):
            return value.attribute(name)
        if isinstance(value, Member):
            if name in ("value", "_value_"):
                return value.value
            return value.name if name == "name" else self._member(value.owner, name, value)
        if isinstance(value, ClassOf):
            return value.name if name in ("__name__", "__qualname__") else self._of(value, name)
        if isinstance(value, Made):
            if name in value.attributes:
                return value.attributes[name]
            return value.owner if name == "__class__" else self._member(value.owner, name, value)
        if isinstance(value, Parent):
            return self._inherited(value, name)
        if isinstance(value, Unknown):
            return Unknown(f"{value.what}.{name}")
        return builtin.method(value, name)

    def _external_attribute(self, value: External, name: str) -> Any:
        path = f"{value.path}.{name}"
        if path not in self.natives and value.path.partition(".")[0] in ENGINES:
            source = self.tree.module(value.path)
            if source is not None and source.binding(name):
                return self.global_value(value.path, name)
        return self._external(path)

    def _of(self, owner: ClassOf, name: str) -> Any:
        """An attribute of a class itself, or of the classes it is made from."""
        if owner.is_enum and name in self._members(owner):
            return self._members(owner)[name]
        statement = owner.statement(name)
        if isinstance(statement, ast.FunctionDef):
            code = SourceFunction(owner.module, statement, {}, owner)
            return BoundMethod(code, owner) if code.kind == "classmethod" else code
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            return self.eval(statement.value, owner.module, {})
        for base in owner.node.bases:
            parent = self.eval(base, owner.module, {})
            if isinstance(parent, ClassOf):
                found = self._of(parent, name)
                if not isinstance(found, Unknown):
                    return (
                        BoundMethod(found.code, owner) if isinstance(found, BoundMethod) else found
                    )
        return Unknown(f"{owner.name}.{name}")

    def _member(self, owner: ClassOf, name: str, on: Any) -> Any:
        found = self._of(owner, name)
        if not isinstance(found, SourceFunction):
            return found
        if found.kind == "property":
            return self.apply(BoundMethod(found, on), (), {})
        return found if found.kind == "staticmethod" else BoundMethod(found, on)

    def _inherited(self, parent: Parent, name: str) -> Any:
        """What ``super()`` gives: of the first base that has it, on what the method was called."""
        for base in parent.owner.node.bases:
            found = self.eval(base, parent.owner.module, {})
            value = self._of(found, name) if isinstance(found, ClassOf) else Unknown(name)
            if isinstance(value, SourceFunction):
                return value if value.kind == "staticmethod" else BoundMethod(value, parent.on)
            if not isinstance(value, Unknown):
                return value
        return Unknown(f"super().{name}")

    def _members(self, owner: ClassOf) -> dict[str, Member]:
        if not owner.members:
            for each in owner.node.body:
                if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
                    name = each.targets[0].id
                    value = self.eval(each.value, owner.module, {})
                    owner.members[name] = Member(owner, name, value)
        return owner.members

    def apply(self, function: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """What a call gives."""
        if isinstance(function, BoundMethod):
            return self._run(function.code, [function.on, *args], named)
        if isinstance(function, SourceFunction):
            return self._run(function, args, named)
        if isinstance(function, ClassOf):
            if function.is_enum and len(args) == 1:
                return self._by_value(function, args[0])
            return Made(function, {**dict(zip(function.fields, args, strict=False)), **named})
        if isinstance(function, builtin.Lifted):
            return function.function(self, *args, **named)
        if isinstance(function, External | Unknown | Given | Made | Member):
            return Unknown(f"{getattr(function, 'path', getattr(function, 'what', 'a call'))}()")
        native: Native = function
        if not callable(native) or isinstance(native, type):
            raise CannotTell("it calls what is no function")
        if not all(is_known(each) for each in (*args, *named.values())):
            return Unknown("an unknown argument")
        return native(*args, **named)

    def _by_value(self, owner: ClassOf, value: Any) -> Any:
        if isinstance(value, Unknown | Member):
            return value
        for member in self._members(owner).values():
            if member.value == value:
                return member
        raise EngineRefuses(f"{value!r} is not a valid {owner.name}", "ValueError")

    def _run(self, code: SourceFunction, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        self._depth += 1
        if self._depth > _DEEP:
            raise CannotTell("its source calls too deep to follow")
        try:
            scope = {**code.closure, **self._arguments(code, args, named)}
            if (owner := code.owner) is not None:
                on = args[0] if args else None
                scope["super"] = Lifted(lambda ev: Parent(owner, on))
            if isinstance(code.node, ast.Lambda):
                return self.eval(code.node.body, code.module, scope)
            try:
                statements.body(self, code.node.body, code.module, scope)
            except statements.Returned as done:
                return done.value
            return None
        finally:
            self._depth -= 1

    def _arguments(
        self, code: SourceFunction, args: Sequence[Any], named: Mapping[str, Any]
    ) -> dict[str, Any]:
        spec = code.node.args
        names = [each.arg for each in (*spec.posonlyargs, *spec.args)]
        scope: dict[str, Any] = dict(zip(names, args, strict=False))
        if spec.vararg:
            scope[spec.vararg.arg] = list(args[len(names) :])
        defaults = dict(zip(reversed(names), reversed(spec.defaults), strict=False))
        for each, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
            names.append(each.arg)
            if default is not None:
                defaults[each.arg] = default
        extra = {key: value for key, value in named.items() if key not in names}
        scope |= {key: value for key, value in named.items() if key in names}
        if spec.kwarg:
            scope[spec.kwarg.arg] = extra
        for name in names:
            if name not in scope:
                known = name in defaults
                scope[name] = self.eval(defaults[name], code.module, {}) if known else Unknown(name)
        return scope


def _absolute_name(statement: ast.ImportFrom, module: SourceModule) -> str:
    """The dotted name of the module that a ``from`` statement names."""
    if not statement.level:
        return statement.module or ""
    parts = module.name.split(".")
    kept = parts[: len(parts) - statement.level + (1 if module.package else 0)]
    return ".".join([*kept, *([statement.module] if statement.module else [])])


def _of_one_package(path: str, other: str) -> bool:
    """Whether two modules are of one package, so that one's source speaks for the other."""
    return path.partition(".")[0] == other.partition(".")[0]
