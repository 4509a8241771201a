"""A FlashInfer install: what is built already, and what its generators would build.

The package that was asked for is the one that is looked at: its interpreter is told where it lies
and says what it imported, and anything else is not judged.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import launch, ninja
from .judge import GpuModule
from .ninja import NinjaBuild

BACKENDS = {"fp4_gemm_cutlass": "flashinfer-cutlass"}
"""Start of a module's name to the backend that loads it."""
DEFAULT_SMS = (100, 103, 120)
"""What specs are asked for where neither a GPU nor ``--arch`` says."""
SPEC_SECONDS = 600.0
"""Longest time for an install to make its specs; it takes 6 to 12 s of CPU."""
_WORKER = Path(__file__).with_name("_worker.py")
_CACHED = re.compile(r"/flashinfer/([^/]+)/([^/]+)/cached_ops/")


@dataclass(frozen=True, slots=True)
class FoundModule:
    """A module and what is known of its build; `sm` is the one it is asked about, if any.

    `flags_known` is False where `build` is that of the install and not of this very library.
    `notes`: further lines for its report. `problem`: why nothing could be learned of it.
    """

    module: GpuModule
    sm: int | None
    build: NinjaBuild | None = None
    flags_known: bool = True
    problem: str | None = None
    notes: tuple[str, ...] = ()


def package_in(path: Path) -> Path | None:
    """The flashinfer package in a folder of packages, an unpacked wheel or an environment."""
    places = [
        path,
        path / "flashinfer",
        *sorted(path.glob("lib/python3*/site-packages/flashinfer")),
    ]
    return next(
        (p for p in places if (p / "jit" / "gemm").is_dir() and (p / "data").is_dir()), None
    )


def modules(
    package: Path, sm: int | None, scratch: Path, built: Sequence[GpuModule]
) -> Iterator[FoundModule]:
    """What is built already, and what would be built for the rest.

    built: prebuilt libraries and those in the JIT cache. One that another version of FlashInfer
    left in the cache is told apart: this install does not load it.
    """
    package = package.resolve()
    mine = installed_version(package)
    specs = _specs(package, (sm,) if sm else DEFAULT_SMS, scratch)
    mine = mine or next((s.module.version for s in specs if s.module.version), None)
    by_name = {s.module.name: s for s in specs}
    for module in built:
        build, known = build_of(module), True
        if build is None and module.name in by_name:
            build, known = by_name[module.name].build, False
        notes: tuple[str, ...] = ()
        if module.kind == "jit" and mine and module.version and module.version != mine:
            module = replace(module, kind="left-over")
            notes = (f"left by FlashInfer {module.version}: the install here, {mine}, loads"
                     " another; what is found counts for neither",)  # fmt: skip
        yield FoundModule(module, sm, build, known, notes=notes)
    there = {m.name for m in built if m.version == mine}
    yield from (s for s in specs if s.module.name not in there)


def _specs(package: Path, sms: Sequence[int], scratch: Path) -> list[FoundModule]:
    """What the install would compile, asked of its own interpreter without a GPU."""
    wanted = {_arch_for_flashinfer(sm): sm for sm in sms if sm >= 100}
    if not wanted:
        return []
    scratch.mkdir(parents=True, exist_ok=True)
    said, problem = _worker_answers(package, scratch, list(wanted))
    unknown = GpuModule(
        "fp4_gemm_cutlass", "spec", None, BACKENDS["fp4_gemm_cutlass"], installed_version(package)
    )
    found: list[FoundModule] = []
    for arch, sm in wanted.items():
        answer = said.get(arch, {"error": problem or "it said nothing"})
        why = _refused(answer, package)
        made = [] if why else list(_of_answer(answer, sm))
        if made:
            found += made
        else:
            why = why or "; ".join(answer.get("errors", [])) or f"it builds nothing for SM{sm}"
            module = replace(unknown, version=answer.get("version") or unknown.version)
            found.append(FoundModule(module, sm, problem=f"its specs cannot be made here: {why}"))
    return found


def _arch_for_flashinfer(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}{'f' if sm == 120 else 'a'}"


def _worker_answers(
    package: Path, scratch: Path, archs: Sequence[str]
) -> tuple[dict[str, dict], str | None]:
    """What the worker said of each architecture, and why it said nothing of others."""
    command = [_interpreter(package), "-P" if sys.version_info >= (3, 11) else "-s",
               str(_WORKER.resolve()), str(package), str(scratch.resolve()), *archs]  # fmt: skip
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("FLASHINFER_")},
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(package.parent),
        "FLASHINFER_WORKSPACE_BASE": str(scratch.resolve()),
    }
    command = [c for c in command if c != "-P"] if _old(command[0]) else command
    try:
        done = subprocess.run(
            command,
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SPEC_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {}, f"they took longer than {SPEC_SECONDS:g} s"
    except OSError as error:
        return {}, f"{command[0]}: {error.strerror or error}"
    answers = {}
    for line in done.stdout.splitlines():
        try:
            answer = json.loads(line)
            answers[answer["arch"]] = answer
        except (ValueError, KeyError, TypeError):
            continue
    last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
    return answers, last


def _interpreter(package: Path) -> str:
    """The interpreter of the environment a package is installed in, else this one."""
    site = package.parent
    if site.name in ("site-packages", "dist-packages") and len(site.parents) > 2:
        own = site.parents[2] / "bin" / "python"
        if own.exists():
            return str(own)
    return sys.executable


def _old(python: str) -> bool:
    """Whether another interpreter may not know ``-P``."""
    return python != sys.executable


def _refused(answer: dict, package: Path) -> str | None:
    """Why an answer counts for nothing: an error, or another FlashInfer than was asked for."""
    if answer.get("error"):
        return str(answer["error"])
    source = Path(str(answer.get("from"))).resolve()
    if not source.is_relative_to(package):
        return f"another FlashInfer was imported, {source}"
    return None


def _of_answer(answer: dict, sm: int) -> Iterator[FoundModule]:
    """The specs that are built for this SM and multiply FP4, by what their sources hold."""
    for name, path in answer["specs"]:
        build = ninja.read(Path(path))
        if build is None or not any(f"sm_{sm}" in flag for flag in build.flags):
            continue
        if launch.for_fp4(build.sources, build.own):
            module = GpuModule(name, "spec", None, backend(name), answer["version"])
            yield FoundModule(module, sm, build)


def prebuilt(sites: Sequence[Path]) -> Iterator[GpuModule]:
    """Ahead-of-time libraries: inside the package, or in wheels of their own."""
    for site in sites:
        folders = [site / "flashinfer" / "data" / "aot"]
        folders += sorted(
            p for w in site.glob("flashinfer_jit_cache*") for p in (w, w / "jit_cache")
        )
        for folder in folders:
            for file in sorted(folder.glob("*/*.so")):
                yield module_at(file)


def jit_cache() -> Iterator[GpuModule]:
    """Libraries that were built on first use, of every version that left some."""
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home())
    for file in sorted((base / ".cache" / "flashinfer").glob("*/*/cached_ops/*/*.so")):
        yield module_at(file)


def module_at(file: Path) -> GpuModule:
    """What a file is by where it lies."""
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
    return GpuModule(name, kind, str(file), backend(name), version_at(file))


def build_of(module: GpuModule) -> NinjaBuild | None:
    return ninja.read(Path(module.path).parent / "build.ninja") if module.path else None


def backend(module: str) -> str | None:
    """The fp4tune backend that loads a module of this name."""
    return next((b for start, b in BACKENDS.items() if module.startswith(start)), None)


def version_at(file: Path) -> str | None:
    """The version a path says: of the JIT cache, or of the wheel it was installed from."""
    path = str(file.resolve())
    if match := _CACHED.search(path + "/"):
        return match[1]
    for parent in file.resolve().parents:
        if parent.name.startswith("flashinfer"):
            return installed_version(parent)
    return None


def installed_version(package: Path) -> str | None:
    for info in sorted(package.parent.glob(f"{package.name}*.dist-info")):
        name, _, version = info.name.removesuffix(".dist-info").partition("-")
        if name in (package.name, f"{package.name}_python"):
            return version
    return None
