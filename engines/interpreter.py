"""The Python environment an engine runs in: its packages, versions and plugins, without importing
any of them. Standard library only."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.machinery import PathFinder

from ..errors import Refused

_ASK = """
import json, sys
from importlib import metadata, util
found = {}
for name in sys.argv[1:]:
    try:
        spec = util.find_spec(name)
    except (ImportError, ValueError):
        continue
    if spec and spec.submodule_search_locations:
        found[name] = list(spec.submodule_search_locations)
versions = {}
plugins = {}
for each in metadata.distributions():
    name = each.metadata["Name"]
    if name and name not in versions:
        versions[name] = each.version
        for entry in each.entry_points:
            plugins.setdefault(entry.group, []).append(entry.name)
groups = ("sglang.srt.plugins", "vllm.general_plugins")
print(json.dumps([sys.path, found, versions, {g: plugins.get(g, []) for g in groups}]))
"""
_PACKAGES = ("sglang", "vllm", "flashinfer")
_SECONDS = 60


class Interpreter:
    """Where one Python finds its packages.

    program   as it was named; None for the Python that runs this
    paths     its ``sys.path``; None for that of this Python, as it is when it is asked
    """

    __slots__ = ("_packages", "_plugins", "_versions", "paths", "program")

    def __init__(
        self,
        program: str | None = None,
        paths: Sequence[str] | None = None,
        packages: Mapping[str, Sequence[str]] | None = None,
        versions: Mapping[str, str] | None = None,
        plugins: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.program = program
        self.paths = None if paths is None else list(paths)
        self._packages = dict(packages or {})
        self._versions = (
            None if versions is None else {normal_name(k): v for k, v in versions.items()}
        )
        self._plugins = plugins

    def package(self, name: str) -> str | None:
        """The folder of a top-level package, None without one."""
        if name in self._packages:
            return next(iter(self._packages[name]), None)
        spec = None
        if self.paths is None:
            with contextlib.suppress(ImportError, ValueError, AttributeError):
                spec = importlib.util.find_spec(name)  # editable installations, too
        if spec is None:
            spec = PathFinder.find_spec(name, self.paths)
        if spec is None or not spec.submodule_search_locations:
            return None
        return next(iter(spec.submodule_search_locations), None)

    def has_module(self, dotted: str) -> bool:
        """Whether a module of that name has a file or folder here."""
        top, _, rest = dotted.partition(".")
        place = self.package(top)
        if place is None:
            return not rest and self.paths is None and _plain_module(top)
        target = os.path.join(place, *rest.split(".")) if rest else place
        return os.path.isdir(target) or os.path.isfile(target + ".py")

    def version(self, distribution: str) -> str | None:
        """The installed version of a distribution, None without one."""
        if self._versions is not None:
            return self._versions.get(normal_name(distribution))
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return None

    def plugins(self, group: str) -> frozenset[str]:
        """Names of the entry points of a group."""
        if self._plugins is not None:
            return frozenset(self._plugins.get(group, ()))
        return frozenset(entry.name for entry in metadata.entry_points(group=group))

    def __str__(self) -> str:
        return self.program or "this Python"


def normal_name(distribution: str) -> str:
    """A distribution's name as indexes compare it: lower case, runs of ``-_.`` as one dash."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@functools.lru_cache(maxsize=8)
def of(program: str | None = None) -> Interpreter:
    """The environment of `program` (``--python``), by default of the Python that runs this.

    Raises Refused where that program does not answer as a Python does.
    """
    if program is None:
        return Interpreter()
    try:
        done = subprocess.run(
            [program, "-c", _ASK, *_PACKAGES], capture_output=True, timeout=_SECONDS, check=True
        )
        paths, packages, versions, plugins = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        why = (str(error).splitlines() or [""])[0]
        if isinstance(error, subprocess.CalledProcessError):
            why = f"it ended with code {error.returncode}; name a Python"
        elif isinstance(error, subprocess.TimeoutExpired):
            why = f"no answer in {_SECONDS:g} s"
        raise Refused(f"--python {program}: it could not be asked what it has ({why})") from None
    return Interpreter(program, paths, packages, versions, plugins)


def _plain_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
