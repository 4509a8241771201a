"""Python source, read and not imported: the top-level statements of a package's modules.

Engines have modules of 400 kB, which take most of a second to parse; so a module is cut at the
lines that begin a statement, and only what binds a wanted name is parsed. Standard library only.
"""

from __future__ import annotations

import ast
import functools
import os
import re

from ..machine import files
from .interpreter import Interpreter

_START = re.compile(r"^(?=[A-Za-z_@\"'(\[{])(?!(?:else|elif|except|finally)\b)", re.M)
_HEAD = re.compile(r"(?:async\s+def|def|class)\s+(\w+)|(\w+)\s*(?:[:=,]|\Z)")
_COMPOUND = re.compile(r"(?:try|if|with|from|import|\()")
_KEYWORDS = frozenset({"try", "if", "with", "else", "finally"})
_STRING = re.compile(
    r"#[^\n]*|\"\"\"(?:\\.|[^\\])*?\"\"\"|'''(?:\\.|[^\\])*?'''"
    r"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'",
    re.S,
)
_LONGEST = 40
"""Pieces a statement may be cut into by lines of text that only look like the start of one."""


class SourceModule:
    """One module's text, by its top-level statements."""

    __slots__ = (
        "_bindings", "_compound", "_named", "_parsed", "_starts", "name", "package", "text",
    )  # fmt: skip

    def __init__(self, name: str, text: str, package: bool) -> None:
        self.name = name
        self.text = text
        self.package = package
        self._starts = _outside([found.start() for found in _START.finditer(text)], text)
        self._parsed: dict[int, list[ast.stmt]] = {}
        self._bindings: dict[str, list[ast.stmt]] = {}
        self._named: dict[str, list[int]] = {}
        self._compound: list[int] = []
        self._index()

    def binding(self, name: str) -> list[ast.stmt]:
        """The top-level statements that bind `name`, in their order; those inside ``try`` and
        ``if`` as the statement they stand in."""
        if name not in self._bindings:
            self._bindings[name] = self._find(name)
        return self._bindings[name]

    def _find(self, name: str) -> list[ast.stmt]:
        found = []
        for at in sorted({*self._named.get(name, ()), *self._compound}):
            if at in self._compound and name not in self.text[self._starts[at] : self._end(at)]:
                continue
            found += [each for each in self._parse(at) if name in bound_by(each)]
        return found

    def _index(self) -> None:
        """Sort the pieces by the name they bind, as far as their first line says."""
        for at, start in enumerate(self._starts):
            head = _HEAD.match(self.text, start)
            name = (head[1] or head[2]) if head else ""
            if name and name not in _KEYWORDS:
                first = at
                while first and self.text[self._starts[first - 1]] == "@":
                    first -= 1  # its decorators
                self._named.setdefault(name, []).append(first)
            elif _COMPOUND.match(self.text, start):
                self._compound.append(at)

    def entry(self, mapping: str, key: str) -> ast.expr | None:
        """The value of ``"key": ...`` in the top-level dictionary `mapping`, without parsing the
        others; None where there is none, or where it is no expression."""
        head = re.search(rf"^{re.escape(mapping)}\b[^\n]*\{{[^\n]*$", self.text, re.M)
        if head is None:
            return None
        found = re.compile(rf"^    [\"']{re.escape(key)}[\"']:", re.M).search(self.text, head.end())
        if found is None:
            return None
        rest = re.compile(r"^(?:    [\"']|\}|    #)", re.M)
        stop = rest.search(self.text, found.end())
        text = self.text[found.end() : stop.start() if stop else None].strip().rstrip(",")
        try:
            return ast.parse(f"({text}\n)", mode="eval").body
        except SyntaxError:
            return None

    def _end(self, at: int) -> int:
        """Where piece `at` ends."""
        return self._starts[at + 1] if at + 1 < len(self._starts) else len(self.text)

    def _parse(self, at: int) -> list[ast.stmt]:
        """The statement that begins with piece `at`; none where that is text inside another."""
        if at not in self._parsed:
            self._parsed[at] = []
            for last in range(at, min(at + _LONGEST, len(self._starts))):
                try:
                    self._parsed[at] = ast.parse(self.text[self._starts[at] : self._end(last)]).body
                    break
                except (SyntaxError, ValueError):
                    continue
        return self._parsed[at]


def _outside(starts: list[int], text: str) -> list[int]:
    """Those of `starts` that are not inside a string over several lines."""
    kept, at = [], 0
    for found in _STRING.finditer(text):
        while at < len(starts) and starts[at] <= found.start():
            kept.append(starts[at])
            at += 1
        while at < len(starts) and starts[at] < found.end():
            at += 1
    return kept + starts[at:]


class SourceTree:
    """The modules of every package that one Python finds."""

    __slots__ = ("_modules", "python")

    def __init__(self, python: Interpreter) -> None:
        self.python = python
        self._modules: dict[str, SourceModule | None] = {}

    def module(self, dotted: str) -> SourceModule | None:
        """A module by its dotted name; None where it has no readable Python file here."""
        if dotted not in self._modules:
            self._modules[dotted] = self._read(dotted)
        return self._modules[dotted]

    def text(self, dotted: str) -> str:
        """The text of a module, empty without one."""
        module = self.module(dotted)
        return module.text if module else ""

    def within(self, dotted: str) -> list[str]:
        """The modules of a package and of the packages in it, by their dotted names; empty where
        there is no such package."""
        top, _, rest = dotted.partition(".")
        place = self.python.package(top)
        base = os.path.join(place, *rest.split(".")) if place else ""
        found = []
        for folder, _, names in os.walk(base):
            inner = os.path.relpath(folder, base)
            path = [dotted] if inner == "." else [dotted, *inner.split(os.sep)]
            found += [".".join([*path, n[:-3]]) for n in names if n.endswith(".py")]
        return sorted(found)

    def _read(self, dotted: str) -> SourceModule | None:
        top, _, rest = dotted.partition(".")
        place = self.python.package(top)
        if place is None:
            return None
        base = os.path.join(place, *rest.split(".")) if rest else place
        for path, package in ((os.path.join(base, "__init__.py"), True), (base + ".py", False)):
            try:
                return SourceModule(dotted, _file_text(path, os.stat(path).st_mtime_ns), package)
            except (OSError, ValueError):
                continue
        return None


@functools.lru_cache(maxsize=64)
def _file_text(path: str, changed: int) -> str:
    """The text of a file as it was at `changed`, kept for the next who asks."""
    return files.text(path)


def bound_by(statement: ast.stmt) -> set[str]:
    """The names that a statement binds where it stands."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        return {n.id for t in statement.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    if isinstance(statement, ast.AnnAssign):
        named = isinstance(statement.target, ast.Name) and statement.value is not None
        return {statement.target.id} if named else set()  # type: ignore[union-attr]
    if isinstance(statement, ast.If | ast.Try | ast.With):
        inner = [*statement.body, *getattr(statement, "orelse", ())]
        for handler in getattr(statement, "handlers", ()):
            inner += handler.body
        inner += getattr(statement, "finalbody", ())
        return {name for each in inner for name in bound_by(each)}
    return set()
