"""Python's parser, one thread at a time."""

from __future__ import annotations

import ast
from threading import Lock

_parser = Lock()


def parsed(source: str | bytes) -> ast.Module:
    """``ast.parse``, which two threads of CPython 3.11 cannot be in at once: it keeps count of its
    depth for all of them together, and ends in a SystemError. Raises SyntaxError, ValueError."""
    with _parser:
        return ast.parse(source)
