"""Which SMs the kernels of libraries have machine code for, and where the driver compiles PTX.

Nothing is disassembled or decompressed: the names come from the code that registers kernels with
CUDA's runtime, the architectures from the headers of the fatbin that each is registered with.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import Refused
from ...machine import codedigest, elf, fatbin
from . import containers, hostimage, launch
from .names import family, shortened
from .sources import has_library_name

DEFAULT_SMS = (90, 100, 120)
ENGINES = {
    "sglang": ("sgl_kernel", "sglang"),
    "vllm": ("vllm",),
    "flashinfer": ("flashinfer", "flashinfer_jit_cache", "flashinfer_cubin"),
}
"""Packages that an engine's libraries are in."""
_UNNAMED = "(kernels whose names are not told)"
_SUFFIX = re.compile(r"sm_?(\d{2,3})([af])(?![a-z0-9])")


@dataclass(slots=True)
class LibraryCoverage:
    """By kernel family and SM: how many kernels are native, compiled by the driver, or absent."""

    path: str
    families: dict[str, dict[int, Counter[str]]] = field(default_factory=dict)
    problem: str | None = None

    def add(self, name: str, images: Sequence[fatbin.Image], sms: Iterable[int]) -> None:
        """Count a kernel of the module that has these images."""
        rows = self.families.setdefault(family(name) if name else _UNNAMED, {})
        for sm in sms:
            word, image = fatbin.coverage(images, sm)
            if word == fatbin.DRIVER and image:
                word = f"{word} {image.name}"
            rows.setdefault(sm, Counter())[word] += 1


def of_paths(
    paths: Sequence[Path], engine: str | None, sms: Sequence[int], match: str | None = None
) -> list[LibraryCoverage]:
    """The coverage of libraries in `paths`, or of an engine's that is installed here.

    match: a regular expression that a library's path or a family's name must contain. Raises
    Refused where there is nothing to look at.
    """
    places = [*paths, *(_engine_packages(engine) if engine else ())]
    if not places:
        raise Refused("--coverage needs a path, or --engine sglang, vllm or flashinfer")
    wanted = re.compile(match) if match else None
    found = []
    for place in places:
        if not place.exists():
            found.append(LibraryCoverage(str(place), problem=f"{place} does not exist"))
            continue
        for file in _files_below(place):
            one = of_file(file, sms, explicit=place.is_file())
            if one is None:
                continue
            if wanted and not wanted.search(one.path):
                one.families = {n: r for n, r in one.families.items() if wanted.search(n)}
                if not one.families:
                    continue
            found.append(one)
    if not found:
        raise Refused(f"no library with GPU code in {', '.join(map(str, places))}")
    return found


def _engine_packages(engine: str) -> Iterator[Path]:
    """Where an engine's packages lie; nothing is imported."""
    if engine not in ENGINES:
        raise Refused(f"--engine {engine} is none of {', '.join(ENGINES)}")
    found = []
    for name in ENGINES[engine]:
        spec = importlib.util.find_spec(name)
        found += [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    if not found:
        raise Refused(f"{engine} is not installed in this interpreter")
    yield from found


def _files_below(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    for folder, folders, names in os.walk(place):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names) if has_library_name(name))


def of_file(path: Path, sms: Sequence[int], explicit: bool = True) -> LibraryCoverage | None:
    """The coverage of one file; None for one without GPU code that was not named itself."""
    found = LibraryCoverage(str(path))
    try:
        with codedigest.mapped(str(path)) as data:
            begin = bytes(data[:8])
            if begin[:4] == fatbin.MAGIC.to_bytes(4, "little"):
                found.add("", list(fatbin.images(data, 0, len(data))), sms)
            else:
                for part in containers.host_parts(data):
                    _of_elf(part, path, found, sms)
    except (elf.BadElf, codedigest.NoCode, OSError) as error:
        found.problem = f"{path.name}: {getattr(error, 'strerror', None) or error}"
    if not found.families and found.problem is None:
        if not explicit:
            return None
        found.problem = f"{path.name}: {containers.NO_GPU_CODE}"
    return found if explicit or found.families or found.problem else None


def _of_elf(data: memoryview, path: Path, found: LibraryCoverage, sms: Sequence[int]) -> None:
    parsed = elf.parse(data)
    if parsed.machine == elf.EM_CUDA:
        for section in parsed.named(".text."):
            name = section.name.removeprefix(".text.")
            found.add(name, [_of_cubin(data, parsed, name, path)], sms)
        return
    sections = [s for s in codedigest.fatbins(parsed) if s.size]
    if not sections:
        return
    if parsed.machine == hostimage.EM_X86_64:
        image = hostimage.read(data, parsed)
        run = launch.registrations(image)
        known: dict[int, list[fatbin.Image]] = {}
        for name, modules in run.modules.items():
            for descriptor in modules:
                if descriptor not in known:
                    at = image.in_file(image.words.get(descriptor + 8, 0))
                    images = fatbin.one(data, at, len(data)) if at is not None else ()
                    known[descriptor] = list(images)
                if known[descriptor]:
                    found.add(name, known[descriptor], sms)
    if not found.families:
        for section in sections:
            end = section.offset + section.size
            found.add("", list(fatbin.images(data, section.offset, end)), sms)


def _of_cubin(data: memoryview, parsed: elf.Elf, name: str, path: Path) -> fatbin.Image:
    """A cubin's one image. That it is for one SM alone is told by names only."""
    from .disassemble import sm_of

    sm = sm_of(data, parsed)
    told = _SUFFIX.search(name) or _SUFFIX.search(path.name)
    letter = told[2] if told and int(told[1]) == sm else ""
    return fatbin.Image(False, sm, letter == "a", letter == "f")


def document(found: Sequence[LibraryCoverage], sms: Sequence[int]) -> list[dict[str, Any]]:
    """As JSON data."""
    return [
        {
            "path": each.path,
            "problem": each.problem,
            "families": {
                name: {f"sm{sm}": dict(rows.get(sm, {})) for sm in sms}
                for name, rows in sorted(each.families.items())
            },
        }
        for each in found
    ]


def lines(found: Sequence[LibraryCoverage], sms: Sequence[int]) -> Iterator[str]:
    """A block a library: a line for each family, with what each SM would run."""
    for each in found:
        yield each.path
        if each.problem:
            yield f"    {each.problem}"
        for name, rows in sorted(each.families.items()):
            said = "  ".join(f"SM{sm}: {_counts_in_words(rows.get(sm, Counter()))}" for sm in sms)
            yield f"    {shortened(name)}  {said}"
    counts = {sm: Counter[str]() for sm in sms}
    for each in found:
        for rows in each.families.values():
            for sm in sms:
                counts[sm].update({w.partition(" ")[0]: n for w, n in rows.get(sm, {}).items()})
    for sm in sms:
        yield f"SM{sm}: {_counts_in_words(counts[sm])} kernels"


def _counts_in_words(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(counter.items())) or "none"
