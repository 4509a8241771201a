"""Which modules of this package a file needs: what has to be copied for it to run without us."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...machine import files
from ...machine.syntax import parsed

PACKAGE = Path(__file__).resolve().parents[2]
NAME = "fp4tune"


def closure(
    files: Iterable[Path],
    package: Path = PACKAGE,
    name: str = NAME,
    outside: Iterable[Path] = (),
) -> list[Path]:
    """Every module of `package` that `files` import, directly or not, as absolute paths.

    By reading the source: imports inside functions count, names made up at run time do not. Files
    outside the package, and those that are said to be `outside` wherever they lie, are roots only
    and not in the result; neither is the package's own ``__init__.py``, which a copy replaces by an
    empty one.
    """
    others = [Path(file).resolve() for file in outside]
    found: dict[Path, None] = {}
    queue = [Path(file).resolve() for file in files]
    for file in queue:
        if _in_package(file, package):
            for each in _with_packages(file, package):
                found.setdefault(each)
    queue += [each for each in found if each not in queue]
    queue += others
    for file in queue:  # grows while it is walked
        for module in _imports(file, package, name, file not in others):
            for each in _with_packages(module, package):
                if each not in found:
                    found[each] = None
                    queue.append(each)
    return list(found)


def _in_package(file: Path, package: Path) -> bool:
    return package in file.parents


def _with_packages(file: Path, package: Path) -> Iterator[Path]:
    """The module and the ``__init__.py`` of every package above it."""
    folder = file.parent
    while package in folder.parents:
        yield folder / "__init__.py"
        folder = folder.parent
    yield file


def _imports(file: Path, package: Path, name: str, relative: bool) -> Iterator[Path]:
    tree = parsed(files.text(file))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(_below(alias.name, package, name))
        elif isinstance(node, ast.ImportFrom):
            base: Path | None
            if node.level and relative and _in_package(file, package):
                base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            elif node.level:
                continue
            else:
                base = _below(node.module or "", package, name)
            if base is None:
                continue
            yield from _module(base)
            for alias in node.names:
                yield from _module(base / alias.name)


def _below(dotted: str, package: Path, name: str) -> Path | None:
    first, *rest = dotted.split(".")
    return package.joinpath(*rest) if first == name else None


def _module(path: Path | None) -> Iterator[Path]:
    if path is None:
        return
    if path.with_suffix(".py").is_file() and path.name:
        yield path.with_suffix(".py")
    elif (path / "__init__.py").is_file():
        yield path / "__init__.py"
