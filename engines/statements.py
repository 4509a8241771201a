"""Statements of an engine's source, for `evaluate`. Standard library only."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from .source import SourceModule, bound_by
from .values import CannotTell, EngineRefuses, Made, SourceFunction, Unknown, is_known, is_true


class Returned(Exception):
    """A function's ``return``, with what it gives."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Left(Exception):
    """``break`` (True) or ``continue`` out of a loop's body."""

    def __init__(self, loop: bool) -> None:
        self.loop = loop


def body(
    ev: Any, statements: Sequence[ast.stmt], module: SourceModule, scope: dict[str, Any]
) -> None:
    for statement in statements:
        ev.step()
        _statement(ev, statement, module, scope)


def _statement(ev: Any, statement: ast.stmt, module: SourceModule, scope: dict[str, Any]) -> None:
    match statement:
        case ast.Return():
            value = statement.value
            raise Returned(None if value is None else ev.eval(value, module, scope))
        case ast.Expr():
            ev.eval(statement.value, module, scope)
        case ast.Assign():
            value = ev.eval(statement.value, module, scope)
            for target in statement.targets:
                assign(ev, target, value, module, scope)
        case ast.AnnAssign() if statement.value is not None:
            assign(ev, statement.target, ev.eval(statement.value, module, scope), module, scope)
        case ast.If():
            test = is_true(ev.eval(statement.test, module, scope))
            body(ev, statement.body if test else statement.orelse, module, scope)
        case ast.For():
            _for(ev, statement, module, scope)
        case ast.Try():
            _try(ev, statement, module, scope)
        case ast.With():
            body(ev, statement.body, module, scope)
        case ast.Import() | ast.ImportFrom():
            for name in bound_by(statement):
                scope[name] = ev.imported(statement, name, module)
        case ast.FunctionDef():
            scope[statement.name] = SourceFunction(module, statement, scope)
        case ast.Raise():
            raise _raised(ev, statement.exc, module, scope)
        case ast.Assert():
            test = ev.eval(statement.test, module, scope)
            if is_known(test) and not is_true(test):
                said = _message(ev, statement.msg, module, scope)
                raise EngineRefuses(said, "AssertionError")
        case ast.Global():
            for name in statement.names:
                scope[f"global {name}"] = True
        case ast.Break() | ast.Continue():
            raise Left(isinstance(statement, ast.Break))
        case ast.Pass() | ast.Delete() | ast.AnnAssign():
            pass
        case _:
            raise CannotTell(f"its source has a {type(statement).__name__} here")


def _try(ev: Any, statement: ast.Try, module: SourceModule, scope: dict[str, Any]) -> None:
    """A body, and the handler that takes what it raises; ``finally`` is nothing to a selection."""
    try:
        body(ev, ev.attempted(statement, module), module, scope)
    except EngineRefuses as refused:
        handler = next((h for h in statement.handlers if _takes(h, refused)), None)
        if handler is None:
            raise
        if handler.name:
            scope[handler.name] = refused
        body(ev, handler.body, module, scope)


_ANY = ("Exception", "BaseException")


def _takes(handler: ast.ExceptHandler, refused: EngineRefuses) -> bool:
    """Whether a handler takes it, by the names of classes. Raises CannotTell where it may."""
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = [ast.unparse(each).rpartition(".")[2] for each in kinds]
    if any(name in (refused.kind, *_ANY) for name in names):
        return True
    if not refused.kind:
        raise CannotTell(f"it depends on whether {' or '.join(names)} is raised")
    return False


def _raised(
    ev: Any, node: ast.expr | None, module: SourceModule, scope: dict[str, Any]
) -> EngineRefuses:
    """What a ``raise`` raises: a new one, or one that was kept."""
    if isinstance(node, ast.Name) and isinstance(scope.get(node.id), EngineRefuses):
        kept: EngineRefuses = scope[node.id]
        return kept
    made = node.func if isinstance(node, ast.Call) else node
    kind = "" if made is None else ast.unparse(made).rpartition(".")[2]
    return EngineRefuses(_message(ev, node, module, scope), kind)


def _for(ev: Any, statement: ast.For, module: SourceModule, scope: dict[str, Any]) -> None:
    for value in sequence(ev.eval(statement.iter, module, scope)):
        assign(ev, statement.target, value, module, scope)
        try:
            body(ev, statement.body, module, scope)
        except Left as leave:
            if leave.loop:
                return
    body(ev, statement.orelse, module, scope)


def assign(
    ev: Any, target: ast.expr, value: Any, module: SourceModule, scope: dict[str, Any]
) -> None:
    if isinstance(target, ast.Name):
        if f"global {target.id}" in scope:
            ev.globals[module.name, target.id] = value
        else:
            scope[target.id] = value
    elif isinstance(target, ast.Tuple | ast.List):
        known = isinstance(value, list | tuple)
        for at, each in enumerate(target.elts):
            assign(ev, each, value[at] if known else Unknown("a part"), module, scope)
    elif isinstance(target, ast.Attribute):
        on = ev.eval(target.value, module, scope)
        if isinstance(on, Made):
            on.attributes[target.attr] = value
    elif isinstance(target, ast.Subscript):
        on = ev.eval(target.value, module, scope)
        if isinstance(on, dict | list):
            on[hashed(ev.eval(target.slice, module, scope))] = value


def _message(ev: Any, node: ast.expr | None, module: SourceModule, scope: dict[str, Any]) -> str:
    """What an error says."""
    if isinstance(node, ast.Call) and node.args:
        node = node.args[0]
    said = ev.eval(node, module, scope) if node is not None else ""
    return " ".join(said.split()) if isinstance(said, str) else "it raises an error"


def sequence(value: Any) -> list[Any]:
    if isinstance(value, list | tuple | set | frozenset | dict):
        return list(value)
    raise CannotTell(f"it goes through {getattr(value, 'what', 'what is no list')}")


def hashed(value: Any) -> Any:
    if isinstance(value, list | dict | set):
        raise CannotTell("it looks up by what is no key")
    return value
