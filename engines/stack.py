"""Whether the versions that were measured are those that an engine has beside it.

A verdict holds for the builds it was made on. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from .installed import EngineHome
from .interpreter import Interpreter, normal_name

_PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*\(?==\s*([^\s;,)]+)\)?\s*(?:;(.*))?$")
_LISTENED = ("torch", "triton", "flashinfer-python", "humming-kernels", "nvidia-cudnn-frontend")
"""The distributions whose pins are compared: those that bring or drive FP4 kernels."""


def measured(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Fingerprint to the versions it was made with, by the rows of ``environment``. Python's own is
    left out: it changes no kernel."""
    found = {}
    for row in rows:
        versions = (row.get("facts") or {}).get("distributions") or {}
        found[row["fingerprint"]] = {n: v for n, v in versions.items() if n != "python"}
    return found


def differing(versions: Mapping[str, str], python: Interpreter) -> str | None:
    """What of `versions` an interpreter has otherwise, in words; None where all are the same."""
    wrong = []
    for name, version in sorted(versions.items()):
        here = python.version(name)
        if here is None:
            wrong.append(f"{name} {version}, which is not there")
        elif here != version:
            wrong.append(f"{name} {version}, and {here} is there")
    return "; ".join(wrong) or None


def made_on_others(versions: Mapping[str, str], home: EngineHome) -> str | None:
    """Why a choice made on `versions` is not one for this engine; None where it is."""
    wrong = differing(versions, home.python)
    return wrong and f"it was measured with {wrong} in the environment of {home.source}"


def pins(engine: EngineHome) -> dict[str, str]:
    """The versions that an engine's own metadata asks for exactly, of what brings FP4 kernels."""
    found = {}
    for line in _requirements(engine):
        match = _PINNED.match(line.strip())
        if match and "extra" not in (match[3] or "") and normal_name(match[1]) in _LISTENED:
            found[normal_name(match[1])] = match[2]
    return found


def warnings(engine: EngineHome, versions: Mapping[str, str]) -> list[str]:
    """What of a probe's `versions` is not what the engine is served with: not what its environment
    has, or not what it asks for itself."""
    if not engine.source.there:
        return [
            f"{engine.engine} is not installed in {engine.python}: these verdicts hold for the "
            "versions measured here; name the engine's interpreter with --python"
        ]
    found = []
    wrong = differing(versions, engine.python)
    if wrong:
        found.append(f"measured with {wrong} in the environment of {engine.source}")
    for name, wanted in sorted(pins(engine).items()):
        have = versions.get(name)
        # A local label ("+cu130") names a build of the version that is asked for.
        if have is not None and have.partition("+")[0] != wanted.partition("+")[0]:
            found.append(f"{engine.source} asks for {name} {wanted}, and {have} was measured")
    return found


def _requirements(engine: EngineHome) -> list[str]:
    name = engine.engine
    if engine.python.paths is None:
        try:
            return list(metadata.requires(name) or ())
        except metadata.PackageNotFoundError:
            return []
    for each in metadata.distributions(name=name, path=engine.python.paths):
        return list(each.requires or ())
    return []
