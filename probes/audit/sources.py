"""Where GPU code is: files and folders that are named, or this interpreter's FlashInfer."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import install, ninja
from .install import FoundModule
from .judge import GpuModule

LIBRARIES = (".so", ".o", ".a", ".cubin", ".fatbin")
"""Endings of files with GPU code; ``libx.so.1.2`` counts as ``.so``."""


@contextmanager
def modules(paths: Sequence[Path], sm: int | None) -> Iterator[Iterator[FoundModule]]:
    """The modules in `paths`, or with none those of this interpreter's FlashInfer and its caches.

    A path may be a library, object, archive, fatbin or cubin, a folder of them, a folder of
    site-packages or an unpacked wheel, a virtual environment or a JIT cache. One with nothing to
    audit comes out as a module with a `problem`. What the context yields holds until it ends:
    specs are written to a temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="fp4tune-") as scratch:
        yield _modules_of_all(paths, sm, Path(scratch))


def _modules_of_all(paths: Sequence[Path], sm: int | None, scratch: Path) -> Iterator[FoundModule]:
    if not paths:
        yield from _here(sm, scratch)
    for number, path in enumerate(paths):
        nothing = True
        for found in _in(path, sm, scratch / str(number)):
            nothing = False
            yield found
        if nothing:
            missing = (
                "does not exist"
                if not path.exists()
                else (f"holds no FlashInfer and no file with GPU code ({', '.join(LIBRARIES)})")
            )
            module = GpuModule(path.name or str(path), "file", str(path))
            yield FoundModule(module, sm, problem=f"{path} {missing}")


def _here(sm: int | None, scratch: Path) -> Iterator[FoundModule]:
    spec = importlib.util.find_spec("flashinfer")
    package = Path(spec.origin).parent if spec and spec.origin else None
    built = [*install.prebuilt([Path(p) for p in sys.path if p]), *install.jit_cache()]
    if package is None:
        yield from (FoundModule(m, sm, install.build_of(m)) for m in built)
        return
    yield from install.modules(package, sm, scratch, built)


def _in(path: Path, sm: int | None, scratch: Path) -> Iterator[FoundModule]:
    if path.is_file():
        module = install.module_at(path)
        yield FoundModule(module, sm, install.build_of(module))
        return
    package = install.package_in(path)
    if package:
        built = list(install.prebuilt([package.resolve().parent]))
        yield from install.modules(package, sm, scratch, built)
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        files = [Path(folder, n) for n in sorted(names) if has_library_name(n)]
        if any(".so" in f.name for f in files):
            files = [f for f in files if f.suffix != ".o"]  # its parts
        for file in files:
            module = install.module_at(file)
            yield FoundModule(module, sm, install.build_of(module))
        if not files and "build.ninja" in names:
            build = ninja.read(Path(folder, "build.ninja"))
            name = Path(folder).name
            version = install.version_at(Path(folder))
            spec = GpuModule(name, "spec", None, install.backend(name), version)
            yield FoundModule(spec, sm, build)


def has_library_name(name: str) -> bool:
    """Whether a file's name is that of a library, object, archive, fatbin or cubin."""
    base, _, numbers = name.partition(".so.")
    return name.endswith(LIBRARIES) or bool(base and numbers and numbers[0].isdigit())
