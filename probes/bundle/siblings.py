"""What the file of a plugin needs of what lies beside it: modules, packages, and files it names."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...machine import files
from ...machine.syntax import parsed
from .closure import NAME

OWN = "backend"
"""The folder of a bundle that stands for the one the plugin's file is in."""
OTHERS = "vendor"
"""The folder for modules from elsewhere, by their names."""
MOST_BYTES = 64 << 20
MOST_FILES = 512
_MOST_NAME = 200


def beside(file: Path, loaded: Mapping[str, str]) -> dict[Path, str]:
    """Every file that goes into a bundle for the plugin `file`, itself included, with its place.

    Found by reading the source (imports inside functions count, and names of files that are there),
    and from `loaded`: the modules, by name, that the plugin brought with it when it was loaded, by
    whatever path. Raises ValueError where they are too many or too large.
    """
    root = file.resolve().parent
    found = {file.resolve(): f"{OWN}/{file.name}"}
    for name, path in loaded.items():
        found.setdefault(Path(path).resolve(), _place_in_bundle(Path(path).resolve(), root, name))
    queue = [path for path in found if path.suffix == ".py"]
    for each in queue:  # grows while it is walked
        for more in _needed(each, root):
            if more not in found and root in more.parents:
                found[more] = _place_in_bundle(more, root, more.stem)
                if more.suffix == ".py":
                    queue.append(more)
    size = sum(path.stat().st_size for path in found)
    if len(found) > MOST_FILES or size > MOST_BYTES:
        raise ValueError(f"{file} needs {len(found)} files of {size} bytes, too many for a bundle")
    return found


def _place_in_bundle(path: Path, root: Path, name: str) -> str:
    if root in path.parents:
        return f"{OWN}/{path.relative_to(root).as_posix()}"
    folders = name.split(".")
    if path.stem != "__init__":
        folders = folders[:-1]
    return "/".join((OTHERS, *folders, path.name))


def _needed(file: Path, root: Path) -> Iterator[Path]:
    try:
        tree = parsed(files.whole(file, MOST_BYTES, links=True))
    except (SyntaxError, ValueError):
        return
    texts: set[Any] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files_of_absolute(alias.name, file, root)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = file
            for _ in range(node.level):
                base = base.parent
            for alias in node.names:
                yield from _module_files(base, f"{node.module or ''}.{alias.name}".strip("."))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield from _files_of_absolute(f"{node.module}.{alias.name}", file, root)
        elif isinstance(node, ast.Constant):
            texts.add(node.value)
    texts = {t for t in texts if isinstance(t, str) and 0 < len(t) <= _MOST_NAME}
    yield from _files_in_strings(texts, file.parent)


def _files_of_absolute(dotted: str, file: Path, root: Path) -> Iterator[Path]:
    first = dotted.split(".")[0]
    if first != NAME and first not in sys.stdlib_module_names:
        for folder in dict.fromkeys((root, file.parent)):
            yield from _module_files(folder, dotted)


def _module_files(folder: Path, dotted: str) -> Iterator[Path]:
    """The files of ``a``, ``a.b`` and ``a.b.c`` in a folder, as far as they are there."""
    for part in filter(None, dotted.split(".")):
        folder = folder / part
        for path in (folder.with_name(f"{part}.py"), folder / "__init__.py"):
            if path.is_file():
                yield path.resolve()


def _files_in_strings(texts: set[str], folder: Path) -> Iterator[Path]:
    """Files beside, or in a folder beside, that the source names in its strings."""
    folders = [folder, *(folder / t for t in texts if _is(folder / t, "is_dir"))]
    for place in folders:
        for text in texts:
            path = place / text
            if _is(path, "is_file") and path.resolve() != folder.resolve():
                yield path.resolve()


def _is(path: Path, what: str) -> bool:
    try:
        return bool(getattr(path, what)())
    except (OSError, ValueError):  # a string that is no name of a file
        return False
