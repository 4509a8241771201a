"""Which code made the evidence: a digest of the modules that measure and check."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from ...machine.syntax import parsed
from ...probes import registry
from ...probes.bundle.closure import PACKAGE, closure

MEASURES = (
    "autotune/census.py",
    "autotune/chains.py",
    "autotune/clock_stability.py",
    "autotune/evidence/recorder.py",
    "autotune/layer.py",
    "autotune/race.py",
    "autotune/regime.py",
    "autotune/retest.py",
    "autotune/stages/collective.py",
    "autotune/stages/controls.py",
    "autotune/stages/grade.py",
    "autotune/stages/prove.py",
    "autotune/stages/quantise.py",
    "autotune/stages/quantiser_timing.py",
    "autotune/stages/stress.py",
    "autotune/stages/timing.py",
    "autotune/verdict/buckets.py",
    "autotune/verdict/statistics.py",
    "machine/memory.py",
    "probes/backends/__init__.py",
    "probes/backends/_returned.py",
    "probes/census",
    "probes/check",
    "probes/data",
    "probes/formats.py",
    "probes/grouped/backend.py",
    "probes/grouped/exact.py",
    "probes/grouped/families.py",
    "probes/grouped/problem.py",
    "probes/grouped/realistic.py",
    "probes/grouped/reference.py",
    "probes/grouped/routing.py",
    "probes/grouped/tensors.py",
    "probes/grouped/tokens.py",
    "probes/grouped/units.py",
    "probes/launch",
    "probes/layouts.py",
    "probes/problem.py",
    "probes/quantisers.py",
    "probes/regimes",
    "probes/seeds.py",
    "probes/worker",
)
"""What decides which launches are made, how they are checked and timed, and what is recorded of
them. Verdicts and choices are made anew from evidence, so what makes them is no part of it; neither
is what plans, prints, publishes, or another backend."""

_CODE = ("*.py", "*.c")
_C_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)

REVOKED: Mapping[str, str] = {}
"""Methods whose failures no longer count, each with the reason: a check that was wrong. A failure
found by any other method counts on, whatever has changed here since."""


@lru_cache(maxsize=1)
def method() -> str:
    """SHA-256 (hex) over the syntax of what measures here, without comments and docstrings."""
    return digest(PACKAGE, _measuring_files(PACKAGE))


@lru_cache(maxsize=256)
def method_of(backend: str) -> str:
    """`method`, with the modules of this package that the backend called `backend` is made of.

    One from elsewhere is part of its environment (`cache.fingerprint`), and adds nothing here.
    """
    try:
        made_by, _ = registry.origin(backend)
    except ValueError:
        return method()
    measuring = set(_measuring_files(PACKAGE))
    own = [m for m in closure([made_by]) if m not in measuring]
    return hashlib.sha256(f"{method()}\n{digest(PACKAGE, own)}".encode()).hexdigest()


def digest(root: Path, modules: Iterable[Path]) -> str:
    """SHA-256 (hex) over the syntax trees of `modules`, without docstrings, and over C without its
    comments, by their places below `root`."""
    sha = hashlib.sha256()
    for path in sorted(modules):
        text = path.read_text("utf-8")
        said = _syntax(text) if path.suffix == ".py" else _words_of_c(text)
        sha.update(f"{path.relative_to(root)}\0{said}\0".encode())
    return sha.hexdigest()


def _measuring_files(root: Path) -> Iterator[Path]:
    for part in MEASURES:
        place = root / part
        yield from (f for end in _CODE for f in place.rglob(end)) if place.is_dir() else (place,)


def _words_of_c(source: str) -> str:
    """C in words, without comments. (A string that looks like one goes with them.)"""
    return " ".join(_C_COMMENT.sub(" ", source).split())


def _syntax(source: str) -> str:
    """The syntax tree of `source` in one spelling; strings that stand alone are docstrings."""
    tree = parsed(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [each for each in body if not _is_docstring(each)] or [ast.Pass()]
    return ast.dump(tree)


def _is_docstring(statement: ast.AST) -> bool:
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement.value.value, str)
