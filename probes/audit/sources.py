"""Where FP4 GEMM modules are: JIT caches, prebuilt wheels, what an install would build, files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import Refused
from . import ninja
from .judge import Module
from .ninja import Build

BACKENDS = {"fp4_gemm_cutlass": "flashinfer-cutlass"}
"""Start of a module's name to the backend that loads it."""
DEFAULT_SMS = (100, 103, 120)
"""What specs are asked for where neither a GPU nor ``--arch`` says."""
KINDS = (".so", ".o", ".cubin")
SPEC_SECONDS = 180.0

_FP4_GEMM = re.compile(r"(?=.*fp4)(?=.*gemm)", re.IGNORECASE)
_CACHED = re.compile(r"/flashinfer/([^/]+)/([^/]+)/cached_ops/")
_SM100 = "gen_gemm_sm100_module_cutlass_fp4"
_GENERATORS = {
    100: (_SM100,),
    103: (_SM100, "gen_gemm_sm103_module_cutlass_fp4"),
    107: (_SM100,),
    110: (_SM100,),
    120: ("gen_gemm_sm120_module_cutlass_fp4",),
    121: ("gen_gemm_sm120_module_cutlass_fp4",),
}
# Run by the interpreter of the install that is looked at. These generators render templates and
# read headers; those of other backends download, and are never called.
_WORKER = """
import json, sys
import flashinfer
from flashinfer.jit.gemm import core
out = {"version": flashinfer.__version__, "specs": [], "errors": []}
for name in sys.argv[1:]:
    try:
        spec = getattr(core, name)()
        spec.write_ninja()
        out["specs"].append([spec.name, str(spec.ninja_path)])
    except Exception as error:
        out["errors"].append(f"{name}: {type(error).__name__}: {error}")
print("\\n" + json.dumps(out))
"""


@dataclass(frozen=True, slots=True)
class Found:
    """A module and what is known of its build; `sm` is the one it is asked about, if any.

    `flags_known` is False where `build` is that of the install and not of this very library.
    """

    module: Module
    sm: int | None
    build: Build | None = None
    flags_known: bool = True
    problem: str | None = None


@contextmanager
def modules(paths: Sequence[Path], sm: int | None) -> Iterator[list[Found]]:
    """The modules in `paths`, or with none those of this interpreter's FlashInfer and its caches.

    A path may be a library, object or cubin, a folder of them, a folder of site-packages or an
    unpacked wheel, a virtual environment or a JIT cache. What the context yields holds until it
    ends: specs are written to a temporary folder.

    Raises Refused for a path that does not exist, or a folder with nothing to audit.
    """
    with tempfile.TemporaryDirectory(prefix="fp4tune-") as scratch:
        if not paths:
            yield list(_here(sm, Path(scratch)))
            return
        found: list[Found] = []
        for number, path in enumerate(paths):
            if not path.exists():
                raise Refused(f"{path} does not exist")
            more = list(_in(path, sm, Path(scratch, str(number))))
            if not more:
                raise Refused(f"{path} holds no FlashInfer and no {', '.join(KINDS)} file")
            found += more
        yield found


def _here(sm: int | None, scratch: Path) -> Iterator[Found]:
    spec = importlib.util.find_spec("flashinfer")
    package = Path(spec.origin).parent if spec and spec.origin else None
    built = [*_prebuilt([Path(p) for p in sys.path if p]), *_jit_cache()]
    if package is None:
        yield from (Found(m, sm, _build_of(m)) for m in built)
        return
    yield from _install(package, sm, scratch, built)


def _in(path: Path, sm: int | None, scratch: Path) -> Iterator[Found]:
    if path.is_file():
        module = _module(path)
        yield Found(module, sm, _build_of(module))
        return
    package = _package(path)
    if package:
        yield from _install(package, sm, scratch, list(_prebuilt([package.parent])))
        return
    for folder, _, names in os.walk(path):
        files = sorted(Path(folder, n) for n in names if n.endswith(KINDS))
        if any(f.suffix == ".so" for f in files):
            files = [f for f in files if f.suffix != ".o"]  # its parts
        for file in files:
            module = _module(file)
            yield Found(module, sm, _build_of(module))
        if not files and "build.ninja" in names:
            build = ninja.read(Path(folder, "build.ninja"))
            name = Path(folder).name
            yield Found(
                Module(name, "spec", None, backend(name), _version(Path(folder))), sm, build
            )


def _package(path: Path) -> Path | None:
    """The flashinfer package in a folder of packages, an unpacked wheel or an environment."""
    places = [
        path,
        path / "flashinfer",
        *sorted(path.glob("lib/python3*/site-packages/flashinfer")),
    ]
    return next(
        (p for p in places if (p / "jit" / "gemm").is_dir() and (p / "data").is_dir()), None
    )


def _install(
    package: Path, sm: int | None, scratch: Path, built: Sequence[Module]
) -> Iterator[Found]:
    """What is built already, and what would be built for the rest."""
    wanted = (sm,) if sm else DEFAULT_SMS
    specs: list[Found] = []
    for each in wanted:
        specs += _specs(package, each, scratch / str(each))
    by_name = {s.module.name: s for s in specs}
    for module in built:
        build, known = _build_of(module), True
        if build is None and module.name in by_name:
            build, known = by_name[module.name].build, False
        yield Found(module, sm, build, known)
    there = {m.name for m in built if m.version == _installed(package)}
    yield from (s for s in specs if s.module.name not in there)


def _specs(package: Path, sm: int, scratch: Path) -> list[Found]:
    """What the install would compile for `sm`, asked of its own interpreter without a GPU."""
    generators = _GENERATORS.get(sm, ())
    if not generators:
        return []
    scratch.mkdir(parents=True, exist_ok=True)
    site = package.parent
    own = site.parents[2] / "bin" / "python" if len(site.parents) > 2 else site
    python = str(own) if site.name == "site-packages" and own.exists() else sys.executable
    letter = "f" if sm == 120 else "a"
    environment = {
        **os.environ,
        "FLASHINFER_WORKSPACE_BASE": str(scratch),
        "FLASHINFER_CUDA_ARCH_LIST": f"{sm // 10}.{sm % 10}{letter}",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(site),
    }
    unknown = Module(
        "fp4_gemm_cutlass", "spec", None, BACKENDS["fp4_gemm_cutlass"], _installed(package)
    )
    try:
        done = subprocess.run(
            [python, "-c", _WORKER, *generators],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SPEC_SECONDS,
        )
        said = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return [Found(unknown, sm, problem=f"its specs took longer than {SPEC_SECONDS:g} s")]
    except (OSError, ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [Found(unknown, sm, problem=f"its specs cannot be made here: {last}")]
    found = []
    for name, path in said["specs"]:
        build = ninja.read(Path(path))
        if build and any(f"sm_{sm}" in flag for flag in build.flags):
            found.append(
                Found(Module(name, "spec", None, backend(name), said["version"]), sm, build)
            )
    if not found:
        return [
            Found(replace(unknown, version=said["version"]), sm, problem="; ".join(said["errors"]))
        ]
    return found


def _prebuilt(sites: Sequence[Path]) -> Iterator[Module]:
    """Ahead-of-time libraries: inside the package, or in wheels of their own."""
    for site in sites:
        folders = [site / "flashinfer" / "data" / "aot"]
        folders += sorted(
            p for w in site.glob("flashinfer_jit_cache*") for p in (w, w / "jit_cache")
        )
        for folder in folders:
            for file in sorted(folder.glob("*/*.so")):
                if _FP4_GEMM.search(file.stem):
                    yield _module(file)


def _jit_cache() -> Iterator[Module]:
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home())
    for file in sorted((base / ".cache" / "flashinfer").glob("*/*/cached_ops/*/*.so")):
        if _FP4_GEMM.search(file.stem):
            yield _module(file)


def _module(file: Path) -> Module:
    path = str(file.resolve())
    if "/flashinfer/data/aot/" in path or "/flashinfer_jit_cache" in path:
        kind = "aot"
    elif (file.parent / "build.ninja").is_file():
        kind = "jit"
    else:
        kind = "file"
    name = file.stem
    if file.suffix == ".o" and kind == "jit":
        name = file.parent.name  # one unit of it
    return Module(name, kind, str(file), backend(name), _version(file))


def _build_of(module: Module) -> Build | None:
    return ninja.read(Path(module.path).parent / "build.ninja") if module.path else None


def backend(module: str) -> str | None:
    """The fp4tune backend that loads a module of this name."""
    return next((b for start, b in BACKENDS.items() if module.startswith(start)), None)


def _version(file: Path) -> str | None:
    """The version a path says: of the JIT cache, or of the wheel it was installed from."""
    path = str(file.resolve())
    if match := _CACHED.search(path + "/"):
        return match[1]
    for parent in file.resolve().parents:
        if parent.name.startswith("flashinfer"):
            return _installed(parent)
    return None


def _installed(package: Path) -> str | None:
    for info in sorted(package.parent.glob(f"{package.name}*.dist-info")):
        name, _, version = info.name.removesuffix(".dist-info").partition("-")
        if name in (package.name, f"{package.name}_python"):
            return version
    return None
