"""Expressions of an engine's source, for `evaluate`: one function for each kind. Standard library
only."""

from __future__ import annotations

import ast
import operator
from typing import Any

from . import builtin
from .source import SourceModule
from .statements import assign, hashed, sequence
from .values import CannotTell, External, SourceFunction, Unknown, is_known, is_true

_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
}  # fmt: skip
_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_OF_SAME = {ast.Eq: True, ast.NotEq: False}
"""What comparing a name of another package with itself gives."""


def _eval_constant(ev: Any, node: ast.Constant, module: SourceModule, scope: dict[str, Any]) -> Any:
    return node.value


def _eval_name(ev: Any, node: ast.Name, module: SourceModule, scope: dict[str, Any]) -> Any:
    if node.id in scope:
        return scope[node.id]
    found = ev.global_value(module.name, node.id)
    if isinstance(found, Unknown) and node.id in builtin.FUNCTIONS:
        return builtin.FUNCTIONS[node.id]
    return found


def _attribute(ev: Any, node: ast.Attribute, module: SourceModule, scope: dict[str, Any]) -> Any:
    return ev.attribute(ev.eval(node.value, module, scope), node.attr)


def _eval_call(ev: Any, node: ast.Call, module: SourceModule, scope: dict[str, Any]) -> Any:
    function = ev.eval(node.func, module, scope)
    args: list[Any] = []
    for each in node.args:
        value = ev.eval(each.value if isinstance(each, ast.Starred) else each, module, scope)
        args += sequence(value) if isinstance(each, ast.Starred) else [value]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        value = ev.eval(keyword.value, module, scope)
        if keyword.arg is not None:
            named[keyword.arg] = value
        elif isinstance(value, dict):
            named |= value
    return ev.apply(function, args, named)


def _boolop(ev: Any, node: ast.BoolOp, module: SourceModule, scope: dict[str, Any]) -> Any:
    """``and`` and ``or``: an operand that decides does so beside unknown ones too."""
    decides = isinstance(node.op, ast.Or)
    unknown: Unknown | None = None
    value: Any = None
    for each in node.values:
        value = ev.eval(each, module, scope)
        try:
            if is_true(value) == decides:
                return value
        except CannotTell as why:
            unknown = unknown or Unknown(str(why).removeprefix("it depends on "))
    return value if unknown is None else unknown


def _unaryop(ev: Any, node: ast.UnaryOp, module: SourceModule, scope: dict[str, Any]) -> Any:
    value = ev.eval(node.operand, module, scope)
    if isinstance(value, Unknown):
        return value
    if isinstance(node.op, ast.Not):
        return not is_true(value)
    return -value if isinstance(node.op, ast.USub) else Unknown(ast.unparse(node)[:60])


def _binop(ev: Any, node: ast.BinOp, module: SourceModule, scope: dict[str, Any]) -> Any:
    left, right = ev.eval(node.left, module, scope), ev.eval(node.right, module, scope)
    function = _BINARY.get(type(node.op))
    if function is None or not (is_known(left) and is_known(right)):
        return Unknown(ast.unparse(node)[:60])
    return function(left, right)


def _eval_compare(ev: Any, node: ast.Compare, module: SourceModule, scope: dict[str, Any]) -> Any:
    left = ev.eval(node.left, module, scope)
    for op, other in zip(node.ops, node.comparators, strict=True):
        right = ev.eval(other, module, scope)
        result = _compared(op, left, right)
        if isinstance(result, Unknown):
            return Unknown(ast.unparse(node)[:80])
        if not result:
            return False
        left = right
    return True


def _ifexp(ev: Any, node: ast.IfExp, module: SourceModule, scope: dict[str, Any]) -> Any:
    test = is_true(ev.eval(node.test, module, scope))
    return ev.eval(node.body if test else node.orelse, module, scope)


def _tuple(ev: Any, node: ast.Tuple, module: SourceModule, scope: dict[str, Any]) -> Any:
    return tuple(_eval_list(ev, node, module, scope))


def _set(ev: Any, node: ast.Set, module: SourceModule, scope: dict[str, Any]) -> Any:
    return set(_eval_list(ev, node, module, scope))


def _eval_list(
    ev: Any, node: ast.List | ast.Tuple | ast.Set, module: SourceModule, scope: dict[str, Any]
) -> Any:
    found: list[Any] = []
    for each in node.elts:
        if isinstance(each, ast.Starred):
            found += sequence(ev.eval(each.value, module, scope))
        else:
            found.append(ev.eval(each, module, scope))
    return found


def _dict(ev: Any, node: ast.Dict, module: SourceModule, scope: dict[str, Any]) -> Any:
    found: dict[Any, Any] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
            found |= ev.eval(value, module, scope)
        else:
            found[hashed(ev.eval(key, module, scope))] = ev.eval(value, module, scope)
    return found


def _subscript(ev: Any, node: ast.Subscript, module: SourceModule, scope: dict[str, Any]) -> Any:
    value = ev.eval(node.value, module, scope)
    if isinstance(node.slice, ast.Slice):
        parts = (node.slice.lower, node.slice.upper, node.slice.step)
        index: Any = slice(*(p and ev.eval(p, module, scope) for p in parts))
    else:
        index = hashed(ev.eval(node.slice, module, scope))
    if not isinstance(value, list | tuple | dict | str) or isinstance(index, Unknown):
        return Unknown(ast.unparse(node)[:60])
    return value[index]


def _joinedstr(ev: Any, node: ast.JoinedStr, module: SourceModule, scope: dict[str, Any]) -> Any:
    parts = []
    for each in node.values:
        if isinstance(each, ast.Constant):
            parts.append(str(each.value))
        elif isinstance(each, ast.FormattedValue):
            value = ev.eval(each.value, module, scope)
            name = getattr(value, "name", None)
            plain = isinstance(value, str | int | float | list | tuple)
            parts.append(str(value) if plain and is_known(value) else str(name or "?"))
    return "".join(parts)


def _namedexpr(ev: Any, node: ast.NamedExpr, module: SourceModule, scope: dict[str, Any]) -> Any:
    scope[node.target.id] = ev.eval(node.value, module, scope)
    return scope[node.target.id]


def _lambda(ev: Any, node: ast.Lambda, module: SourceModule, scope: dict[str, Any]) -> Any:
    return SourceFunction(module, node, scope)


def _listcomp(
    ev: Any,
    node: ast.ListComp | ast.GeneratorExp | ast.SetComp,
    module: SourceModule,
    scope: dict[str, Any],
) -> Any:
    found: list[Any] = []

    def level(at: int, inner: dict[str, Any]) -> None:
        if at == len(node.generators):
            found.append(ev.eval(node.elt, module, inner))
            return
        each = node.generators[at]
        for value in sequence(ev.eval(each.iter, module, inner)):
            mine = dict(inner)
            assign(ev, each.target, value, module, mine)
            if all(is_true(ev.eval(test, module, mine)) for test in each.ifs):
                level(at + 1, mine)

    level(0, dict(scope))
    return found


def _setcomp(ev: Any, node: ast.SetComp, module: SourceModule, scope: dict[str, Any]) -> Any:
    return set(_listcomp(ev, node, module, scope))


def _compared(op: ast.cmpop, left: Any, right: Any) -> Any:
    if isinstance(op, ast.Is | ast.IsNot):
        if isinstance(left, Unknown) or isinstance(right, Unknown):
            return Unknown("a comparison")
        return (left is right) == isinstance(op, ast.Is)
    if isinstance(op, ast.In | ast.NotIn):
        if isinstance(left, Unknown) or not isinstance(
            right, list | tuple | set | frozenset | dict | str
        ):
            return Unknown("a comparison")
        there = left in right
        if not there and not is_known(right):
            return Unknown("a comparison")
        return there == isinstance(op, ast.In)
    if isinstance(left, External) and left == right:
        return Unknown("a comparison") if type(op) not in _OF_SAME else _OF_SAME[type(op)]
    if not (is_known(left) and is_known(right)):
        return Unknown("a comparison")
    return _COMPARE[type(op)](left, right)


KINDS: dict[type, Any] = {
    ast.Constant: _eval_constant,
    ast.Name: _eval_name,
    ast.Attribute: _attribute,
    ast.Call: _eval_call,
    ast.BoolOp: _boolop,
    ast.UnaryOp: _unaryop,
    ast.BinOp: _binop,
    ast.Compare: _eval_compare,
    ast.IfExp: _ifexp,
    ast.Tuple: _tuple,
    ast.Set: _set,
    ast.List: _eval_list,
    ast.Dict: _dict,
    ast.Subscript: _subscript,
    ast.JoinedStr: _joinedstr,
    ast.NamedExpr: _namedexpr,
    ast.Lambda: _lambda,
    ast.ListComp: _listcomp,
    ast.SetComp: _setcomp,
    ast.GeneratorExp: _listcomp,
}
"""What evaluates each kind of expression."""
