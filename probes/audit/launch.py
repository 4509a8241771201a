"""Is a kernel known to be launched with PDL? From its host code, its sources or its metadata.

A kernel that never waits is only dangerous if it is launched before its predecessor has ended.
That is decided on the host, so no kernel's code can say it. Only the launch of that very kernel
clears it: what a module does with others says nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from ...machine import codedigest, elf, files
from . import containers, hostimage
from .hostrun import (
    NO,
    POSSIBLE,
    REGISTERS_KERNEL,
    REGISTERS_MODULE,
    UNKNOWN,
    YES,
    HostRun,
    LaunchSite,
    launch_call,
)

__all__ = ["NO", "POSSIBLE", "UNKNOWN", "YES", "PdlUse", "combined", "of_host_code",
           "of_sources", "of_triton"]  # fmt: skip

_ORDER = (YES, POSSIBLE, UNKNOWN, NO)
STEPS = 300_000
"""Instructions of one file that are followed to its launches: 3 to 5 s."""
REGISTRATIONS = 900_000
"""Instructions of one file that are followed to learn which kernel a host function stands for."""


@dataclass(frozen=True, slots=True)
class PdlUse:
    """How a module launches. `pdl`: ``yes``, ``no``, ``possible`` (decided as it runs) or
    ``unknown``; `evidence`: how that is known; `every`: whether it holds for each launch."""

    pdl: str = UNKNOWN
    evidence: tuple[str, ...] = ()
    every: bool = False
    kernels: Mapping[str, str] = field(default_factory=dict)
    """The same by (mangled) name, of kernels whose own launch was found."""
    block_scaled: bool = False
    """Whether its sources multiply block-scaled operands."""

    def of(self, kernel: str) -> str:
        """How one kernel is launched."""
        if kernel in self.kernels:
            return self.kernels[kernel]
        return self.pdl if self.every and self.pdl in (YES, NO) else UNKNOWN


def combined(found: Iterable[PdlUse]) -> PdlUse:
    """What several sources say together: one launch with PDL is enough."""
    found = list(found)
    evidence = tuple(line for each in found for line in each.evidence)
    kernels: dict[str, str] = {}
    for each in found:
        for name, pdl in each.kernels.items():
            kernels[name] = min(pdl, kernels.get(name, NO), key=_ORDER.index)
    scaled = any(each.block_scaled for each in found)
    for pdl in (YES, POSSIBLE, NO):
        if any(each.pdl == pdl for each in found):
            every = any(each.pdl == pdl and each.every for each in found)
            return PdlUse(pdl, evidence, every, kernels, scaled)
    return PdlUse(UNKNOWN, evidence, False, kernels, scaled)


# --- host code -----------------------------------------------------------------------------

# ModRM bytes of `lea register, [rip + distance]`.
_RSI, _RDX, _RCX, _RDI = 0x35, 0x15, 0x0D, 0x3D
_LOADS_OR_CALLS = re.compile(rb"(?=\x48\x8d([\x35\x15\x0d\x3d])(....)|\xe8(....))", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_$][\w$.]*$")
_INDIRECT = ("cudaGetDriverEntryPoint", "cuGetProcAddress", "dlsym")


def of_host_code(path: Path, doubted: Iterable[str] = ()) -> PdlUse:
    """From the machine code of the library or object that launches.

    doubted: kernels that are safe only if launched without PDL; every use of their address is
    looked at, so that they can be cleared. What is not seen is unknown, not absent.
    """
    names = frozenset(doubted)
    try:
        with codedigest.mapped(str(path)) as data:
            parts = [of_image(part, names) for part in containers.host_parts(data)]
    except (elf.BadElf, OSError):
        return PdlUse()
    if len(parts) <= 1:
        return parts[0] if parts else PdlUse()
    whole = combined(parts)
    # Objects of an archive launch each other's kernels: one object's word is not the last.
    every = whole.pdl == NO and all(part.pdl == NO and part.every for part in parts)
    kernels = {k: v for k, v in whole.kernels.items() if v != NO}
    return replace(whole, every=every, kernels=kernels)


def of_image(data: memoryview, doubted: frozenset[str]) -> PdlUse:
    """`of_host_code` of a file's bytes. Raises BadElf."""
    parsed = elf.parse(data)
    if parsed.machine == elf.EM_CUDA:
        return PdlUse()
    if parsed.machine != hostimage.EM_X86_64:
        return PdlUse(evidence=("host code: launches are read on x86-64 only",))
    return _Launches(hostimage.read(data, parsed), doubted).found()


def registrations(image: hostimage.HostImage) -> HostRun:
    """Which kernel each host function stands for, and which fatbins have it."""
    launches = _Launches(image, frozenset())
    launches._graph()
    return launches._registered()


class _Launches:
    """The launches of one host file, and what they say of its kernels."""

    def __init__(self, image: hostimage.HostImage, doubted: frozenset[str]) -> None:
        self.image = image
        self.doubted = doubted
        known = {address: name for name, address in image.names.items() if _interesting(name)}
        self.calls = {a: n.partition("@")[0] for a, n in {**known, **image.imports}.items()}
        self.names = set(self.calls.values())
        self.callers: dict[int, set[int]] = {}
        self._linkage = image.linkage()
        self.complete = True

    def found(self) -> PdlUse:
        attributes = any(launch_call(n) == "attributes" for n in self.names)
        indirect = any(n.startswith(_INDIRECT) for n in self.names)
        if not attributes:
            if indirect or not any(launch_call(n) == "plain" for n in self.names):
                return PdlUse(evidence=self._nothing(indirect))
            line = "host code: it imports no call that launches with attributes, so not with PDL"
            return PdlUse(NO, (line,), True)
        try:
            import capstone  # noqa: F401
        except ImportError:
            line = "host code: launches with attributes; reading them needs pip install capstone"
            return PdlUse(evidence=(line,))
        self._graph()
        sites = self._sites()
        kernels = self._kernels(sites) if sites or self.doubted else {}
        counts = Counter(site.pdl for site in sites)
        told = {
            YES: "with PDL",
            POSSIBLE: "with PDL if that is asked for as it runs",
            NO: "without PDL",
            UNKNOWN: "with attributes that could not be followed",
        }
        said = ", ".join(f"{counts[pdl]} {told[pdl]}" for pdl in _ORDER if counts[pdl])
        line = (
            f"host code: {len(sites)} launches with attributes: {said}"
            if sites
            else ("host code: launches with attributes; the calls were not found")
        )
        pdl = next((p for p in _ORDER if counts[p]), UNKNOWN)
        return PdlUse(pdl, (line, *self._stripped()), kernels=kernels)

    def _nothing(self, indirect: bool) -> tuple[str, ...]:
        if indirect:
            return ("host code: it looks up calls by name as it runs: its launches are not told",)
        if self.image.stripped:
            return ("host code: stripped, and no call of CUDA's runtime is imported: its launches"
                    " cannot be told",)  # fmt: skip
        return ()

    def _stripped(self) -> tuple[str, ...]:
        return ("host code: stripped of its symbols",) if self.image.stripped else ()

    def _graph(self) -> None:
        """Who calls whom, as far as that leads to calls that are known."""
        wanted = {start for start, _ in self.image.functions} | set(self.calls)
        for at, target in self.image.calls(wanted):
            function = self.image.function(at)
            if function:
                self.callers.setdefault(target, set()).add(function[0])

    def _leading(self, wanted: Iterable[int], most: int = 6) -> set[int]:
        """Functions from which one of `wanted` is reached by direct calls."""
        seen: set[int] = set()
        edge = set(wanted)
        for _ in range(most):
            edge = {c for each in edge for c in self.callers.get(each, ())} - seen
            seen |= edge
        return seen

    def _sites(self) -> set[LaunchSite]:
        """Launches with attributes: in each function that has one, or as its callers have it."""
        apis = [a for a, name in self.calls.items() if launch_call(name) == "attributes"]
        leads = frozenset(self._leading(apis))
        todo = {c for api in apis for c in self.callers.get(api, ())}
        run = HostRun(self.image, self.calls, leads, STEPS)
        sites: set[LaunchSite] = set()
        done: set[int] = set()
        while todo:
            start = todo.pop()
            done.add(start)
            run.found = {}
            run.root(start)
            seen = {s for s in run.sites if s.attributes}
            callers = self.callers.get(start, set()) - done
            if callers and any(s.kernels is None or s.pdl in (POSSIBLE, UNKNOWN) for s in seen):
                todo |= callers & leads
                if callers <= leads:
                    continue  # as they call it
            sites |= {s for s in seen}
            if run.gave_up:
                self.complete = False
                break
        return sites

    def _registered(self) -> HostRun:
        """Which kernel each host function stands for, and which modules have it."""
        kernels, modules = (
            {c for a, n in self.calls.items() if n == name for c in self.callers.get(a, ())}
            for name in (REGISTERS_KERNEL, REGISTERS_MODULE)
        )
        run = HostRun(self.image, self.calls, frozenset(kernels - modules), REGISTRATIONS)
        # One function registers both, or hands its module on to another that does.
        for start in sorted(modules):
            span = self.image.function(start)
            plain = start in kernels and span and self._registered_plainly(span, run)
            if not plain:
                run.root(start)
        for start in sorted(kernels - modules - run.entered):
            run.root(start)
        return run

    def _registered_plainly(self, span: tuple[int, int], run: HostRun) -> bool:
        """Learn the kernels of a function that registers them as an optimising compiler writes it:
        addresses loaded into argument registers, then the call. False where it is otherwise."""
        held: dict[int, int] = {}
        found: list[tuple[int, str, int]] = []
        linkage = self._linkage
        code = self.image.code(*span)
        for match in _LOADS_OR_CALLS.finditer(code):
            register, lea, call = match.groups()
            if lea is not None:
                end = span[0] + match.start() + 7
                held[register[0]] = end + int.from_bytes(lea, "little", signed=True)
                continue
            target = span[0] + match.start() + 5 + int.from_bytes(call, "little", signed=True)
            name = self.calls.get(linkage.get(target, target))
            if name == REGISTERS_MODULE:
                held[-1] = held.get(_RDI, 0)
            elif name == REGISTERS_KERNEL:
                host, text = held.pop(_RSI, None), held.pop(_RDX, held.pop(_RCX, None))
                kernel = self.image.text(text) if text is not None else None
                if host is None or not kernel or not _NAME.match(kernel) or -1 not in held:
                    return False
                found.append((host, kernel, held[-1]))
        for host, kernel, module in found:
            run.registered[host] = kernel
            run.modules.setdefault(kernel, set()).add(module)
        return bool(found)

    def _kernels(self, sites: set[LaunchSite]) -> dict[str, str]:
        registered = self._registered().registered
        found: dict[str, str] = {}
        for site in sites:
            for address in site.kernels or ():
                name = registered.get(address)
                if name:
                    found[name] = min(site.pdl, found.get(name, NO), key=_ORDER.index)
        doubted = {a: n for a, n in registered.items() if n in self.doubted and n not in found}
        if doubted and self.complete:
            for name in self._cleared(doubted):
                found[name] = NO
        return found

    def _cleared(self, doubted: Mapping[int, str]) -> set[str]:
        """Of the kernels at these addresses, those that nothing here launches with PDL.

        That is so if every function that takes the address is followed, gives it to nobody who is
        not, and launches nothing with attributes that may be it.
        """
        held = set(self.image.words.values()) & set(doubted)
        users: dict[int, set[int]] = {}
        for at, target in self.image.references():
            if target in doubted:
                function = self.image.function(at)
                users.setdefault(target, set()).add(function[0] if function else -1)
        registering = {
            c
            for a, n in self.calls.items()
            if n == REGISTERS_KERNEL
            for c in self.callers.get(a, ())
        }
        apis = [a for a, name in self.calls.items() if launch_call(name)]
        leads = frozenset(self._leading(apis))
        cleared = set()
        for address, name in doubted.items():
            if address in held and not self._slots_only(address):
                continue
            run = HostRun(self.image, self.calls, leads, STEPS // 4)
            run.watched = frozenset(doubted)
            for start in users.get(address, set()) - registering:
                if start < 0:
                    run.gave_up = True
                    break
                run.root(start)
            early = any(
                s.attributes and s.pdl != NO and (s.kernels is None or address in s.kernels)
                for s in run.sites
            )
            if not run.gave_up and not early and address not in run.escaped:
                cleared.add(name)
        return cleared

    def _slots_only(self, address: int) -> bool:
        """Whether the words that hold an address are only what code loads it through."""
        places = {place for place, value in self.image.words.items() if value == address}
        return all(self.image.is_slot(place) for place in places)


def _interesting(name: str) -> bool:
    return launch_call(name) is not None or name in (REGISTERS_KERNEL, REGISTERS_MODULE)


# --- sources -------------------------------------------------------------------------------

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*")
_NAMES = r"(?:enable_?PDL|launch_with_pdl|enable_pdl|use_pdl)"
_ALWAYS = re.compile(
    rf"/\*\s*{_NAMES}\s*=?\s*\*/\s*true\b"
    r"|programmaticStreamSerializationAllowed\s*=\s*(?:1|true)\b"
    r"|\.run\([^;{}]*nullptr\s*,\s*true\s*\)"
)
_NEVER = re.compile(rf"/\*\s*{_NAMES}\s*=?\s*\*/\s*false\b")
_MAYBE = re.compile(
    rf"/\*\s*{_NAMES}\s*=?\s*\*/\s*\w+|programmaticStreamSerializationAllowed\s*=\s*\w+"
    r"|cudaLaunchAttributeProgrammaticStreamSerialization"
)
_WAITS = re.compile(r"griddepcontrol\.wait|cudaGridDependencySynchronize\s*\(")
_SCALED = re.compile(r"BlockScaled|nv_float4_t|mx_float4_t|blockscaled", re.IGNORECASE)
_FP4 = re.compile(r"float4_t|e2m1|__nv_fp4")
_MOST_FILES = 2000


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What a module's own sources say. `waits`: files with hand-written waits."""

    launch: PdlUse
    waits: tuple[str, ...]


def of_sources(sources: Sequence[Path], roots: Sequence[Path]) -> SourceFacts:
    """Read `sources` and what they include from `roots` (CUTLASS and CUDA are no such root:
    they can do everything and decide nothing)."""
    evidence: dict[str, list[str]] = {YES: [], POSSIBLE: [], NO: []}
    waits = []
    scaled = False
    for file, text in _texts(sources, roots):
        for pdl, pattern in ((YES, _ALWAYS), (NO, _NEVER), (POSSIBLE, _MAYBE)):
            if match := pattern.search(text):
                said = " ".join(match.group(0).split())[-60:]
                evidence[pdl].append(f"source {file.name}: {said}")
                break
        scaled = scaled or bool(_SCALED.search(text))
        if _WAITS.search(text):
            waits.append(file.name)
    only = sum(bool(lines) for lines in evidence.values()) == 1
    found = [
        PdlUse(pdl, tuple(sorted(lines)[:4]), only and pdl == YES)
        for pdl, lines in evidence.items()
        if lines
    ]
    use = replace(combined(found), block_scaled=scaled)
    return SourceFacts(use, tuple(sorted(waits)))


def for_fp4(sources: Sequence[Path], roots: Sequence[Path]) -> bool:
    """Whether a module's own sources multiply FP4 operands on CUTLASS's block-scaled kernels."""
    return any(_FP4.search(text) and _SCALED.search(text) for _, text in _texts(sources, roots))


def _texts(sources: Sequence[Path], roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The module's own sources and headers, without comments."""
    todo, seen = list(sources), set(sources)
    while todo and len(seen) < _MOST_FILES:
        file = todo.pop()
        try:
            text = _without_comments(str(file))
        except OSError:
            continue
        yield file, text
        for name in _INCLUDE.findall(text):
            for root in (file.parent, *roots):
                near = root / name
                if near.is_file():
                    near = near.resolve()
                    if near not in seen and _below_any(near, roots, file.parent):
                        seen.add(near)
                        todo.append(near)
                    break


@lru_cache(maxsize=4000)
def _without_comments(file: str) -> str:
    return _COMMENT.sub("", files.text(file, errors="replace"))


def _below_any(file: Path, roots: Sequence[Path], beside: Path) -> bool:
    return any(file.is_relative_to(root.resolve()) for root in (*roots, beside))


# --- metadata ------------------------------------------------------------------------------


def of_triton(cubin: Path) -> PdlUse:
    """From the JSON that Triton writes beside a cubin in its cache: its one kernel's launch."""
    try:
        known = json.loads(files.text(cubin.with_suffix(".json")))
        with_pdl = known["launch_pdl"]
    except (OSError, ValueError, KeyError, TypeError):
        return PdlUse()
    name = cubin.with_suffix(".json").name
    return PdlUse(YES if with_pdl else NO, (f"{name}: launch_pdl is {bool(with_pdl)}",), True)
