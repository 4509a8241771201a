"""Names of kernels for people: demangled, and without their template arguments."""

from __future__ import annotations

import re

from ...machine.demangle import demangled

MOST = 240
"""Characters of a list of names that are shown."""


def family(mangled: str) -> str:
    """What a kernel is called without template arguments, parameters and return type.

    ``void marlin_moe::Marlin<half, 4>(int4 const*)`` is of the family ``marlin_moe::Marlin``.
    """
    text = demangled(mangled)
    if text == mangled:
        return _nested(mangled)
    text = text.replace("(anonymous namespace)", "{anonymous}").replace("operator<", "operator ")
    kept, depth = [], 0
    for letter in text:
        if letter in "<(":
            if letter == "(" and depth == 0:
                break
            depth += 1
        elif letter in ">)":
            depth -= 1
        elif depth == 0:
            kept.append(letter)
    return re.sub(r"\s+", " ", "".join(kept)).strip().rpartition(" ")[2] or text


def _nested(mangled: str) -> str:
    """The names a mangled one begins with; the whole where it is of another form."""
    match = re.match(r"_ZN?(?:St|K|V)*", mangled)
    at, parts = (match.end() if match else 0), []
    while match and (length := re.match(r"\d+", mangled[at:])):
        at += length.end()
        parts.append(mangled[at : at + int(length[0])])
        at += int(length[0])
    return "::".join(parts) or mangled


def short(mangled: str) -> str:
    """A kernel's family, or the beginning of a name that cannot be told apart."""
    name = family(mangled)
    return name if len(name) <= 80 else name[:77] + "..."


def shortened(text: str) -> str:
    return text if len(text) <= MOST else text[: MOST - 4] + " ..."
