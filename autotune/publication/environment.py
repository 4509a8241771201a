"""Whether an environment that evidence was taken in is the one that is here now.

A reader sees that a file was replaced, and must take that for a change. Here the environment is put
together again, from the versions that are installed, the machine code in the files, the hardware's
facts and the variables, and compared by fingerprint: a reinstalled wheel of the same version, or a
module that was compiled again to the same code, is no change. No GPU is used for it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from typing import Any

from ...cache import fingerprint, state
from ...cache.rows import Candidate, Environment, Stamp
from ...machine import codedigest, files
from ...machine.hardware import IDENTITY

Machine = Mapping[str, Mapping[str, Any]]
"""The name of a GPU's model, or ``cpu``, to its facts as `fingerprint.hardware` has them."""


STALE = "stale: "
"""How the reason of a withdrawn candidate begins."""


def withdrawn(candidate: Candidate) -> bool:
    return bool(candidate.reasons) and candidate.reasons[0].startswith(STALE)


def withdraw(candidate: Candidate, changes: Sequence[str]) -> Candidate:
    """`candidate` as one that nothing is claimed of, because of `changes`."""
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    reason = f"{STALE}{'; '.join(changes[:3])}{more}"
    return replace(
        candidate, verdict="inconclusive", rank=None, conditions=(), reasons=(reason,), bounds={}
    )


@dataclass(frozen=True, slots=True)
class EnvironmentCheck:
    """An environment looked at again. Where `changes` is empty it holds, with its new stamps."""

    environment: Environment
    changes: tuple[str, ...]


def compare_with_now(
    environment: Environment, machine: Machine, environ: Mapping[str, str]
) -> EnvironmentCheck | None:
    """`environment` compared with what is here now; None where its device is not on `machine`.

    `environ` are the variables that a probe would run with. What cannot be asked again without
    starting the backend (CUDA's version comes with torch's) is taken to have stayed.
    """
    facts = dict(environment.facts)
    here = machine.get(model(environment))
    if here is None:
        return None
    before: Mapping[str, Any] = facts.get("device") or {}
    known = {k: v for k, v in here.items() if k not in IDENTITY and k in before}
    facts["device"] = {**before, **known}
    installed = [s for s in environment.stamps if _is_metadata(s.path)]
    sources = [s for s in environment.stamps if s.path.endswith(".py")]
    files = [s for s in environment.stamps if s not in installed and s not in sources]
    versions = dict(facts.get("distributions") or {})
    now_installed: dict[str, Stamp | None] = {}
    for stamp in installed:
        name, version, found = _installed(stamp.path)
        now_installed[stamp.path] = found
        for key in versions:
            if _plain(key) == name:
                versions[key] = version
    facts["distributions"] = versions
    names = [name for name in versions if name != "python"]
    facts["variables"] = fingerprint.variables(environ, names)
    another = facts["device"].get("driver") != before.get("driver")
    if any(_stamp_changed(stamp) for stamp in files) or (another and fingerprint.COMPILED in facts):
        for name in ("files", fingerprint.COMPILED):
            facts.pop(name, None)
        sm = environment.arch.removeprefix("sm")
        compiler = codedigest.compiler(int(sm) if sm.isdecimal() else None, facts["device"])
        facts.update(_code_facts([stamp.path for stamp in files], compiler))
    if any(_stamp_changed(stamp) for stamp in sources):
        facts["extra"] = {**(facts.get("extra") or {}), **_source_facts(sources)}
    if fingerprint.of(facts) == environment.fingerprint:
        stamps = tuple(_now(s.path) or s for s in (*files, *sources))
        stamps += tuple(now_installed[s.path] or s for s in installed)
        return EnvironmentCheck(replace(environment, stamps=stamps), ())
    return EnvironmentCheck(environment, tuple(differences(environment.facts, facts)))


def model(environment: Environment) -> str:
    """The device this environment is of, as a `Machine` names it."""
    if environment.arch == "cpu":
        return "cpu"
    device: Mapping[str, Any] = environment.facts.get("device") or {}
    return str(device.get("gpu") or device.get("name"))


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterable[str]:
    """What differs between two environments' facts, a short phrase each."""
    for group in ("distributions", "device", "variables"):
        old, new = before.get(group) or {}, after.get(group) or {}
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                yield f"{key}: {_shortened(old.get(key))}, now {_shortened(new.get(key))}"
    if any(before.get(key) != after.get(key) for key in ("code", "files")):
        yield "the compiled code is another"
    if before.get(fingerprint.COMPILED) != after.get(fingerprint.COMPILED):
        yield "the code that the driver compiles is another"
    if before.get("extra") != after.get("extra"):
        yield "the backend's own source is another"


def _shortened(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_metadata(path: str) -> bool:
    folder, name = os.path.split(path)
    return name == "METADATA" and folder.endswith(".dist-info")


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")


def _installed(path: str) -> tuple[str, str | None, Stamp | None]:
    """(plain name, version, stamp) of what is installed now in the place of a METADATA file."""
    folder = os.path.dirname(path)
    site = os.path.dirname(folder)
    name = os.path.basename(folder).removesuffix(".dist-info").rpartition("-")[0]
    there = state.file_stamp(path)
    if there is not None:
        version = _metadata_version(path, there)
        if version is not None:
            return _plain(name), version, Stamp(path, *there)
    for found in metadata.distributions(name=name.replace("_", "-"), path=[site]):
        where = os.path.join(site, f"{name}-{found.version}.dist-info", "METADATA")
        return _plain(name), found.version, _now(where)
    return _plain(name), None, None


@lru_cache(maxsize=1024)
def _metadata_version(path: str, stamp: tuple[int, int, int]) -> str | None:
    """The version a METADATA file says; asked of the file once for each of its stamps."""
    try:
        with files.opened(path) as file:
            for line in io.TextIOWrapper(file, encoding="utf-8", errors="replace"):
                if line.startswith("Version:"):
                    return line.partition(":")[2].strip()
                if not line.strip():
                    return None
    except OSError:
        return None
    return None


def _code_facts(paths: list[str], compiler: codedigest.DriverCompiler | None) -> dict[str, Any]:
    """The facts of compiled files as `fingerprint.environment` writes them."""
    if not all(os.path.exists(path) for path in paths):
        return {"code": "gone"}
    found = codedigest.combined(sorted(paths), compiler)
    facts: dict[str, Any] = {"code": found.value, **fingerprint.compiled(found)}
    if found.value is None:
        facts["files"] = sorted(fingerprint.content(path) for path in paths)
    return facts


def _source_facts(stamps: Sequence[Stamp]) -> dict[str, str]:
    try:
        return fingerprint.source(stamp.path for stamp in stamps)
    except OSError:
        return {"source": "gone"}


def _now(path: str) -> Stamp | None:
    found = state.file_stamp(path)
    return Stamp(path, *found) if found else None


def _stamp_changed(stamp: Stamp) -> bool:
    return _now(stamp.path) != stamp


def moved(environments: Iterable[Environment]) -> bool:
    """Whether any file that these rest on is another than it was: cheap, a `stat` each."""
    paths = {stamp.path: stamp for e in environments for stamp in e.stamps}
    return any(_stamp_changed(stamp) for stamp in paths.values())
