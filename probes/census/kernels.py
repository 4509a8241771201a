"""What a census holds: the kernels that really ran, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...machine import codedigest
from ...machine.demangle import demangled

CUPTI, PROFILER, NONE = "cupti", "profiler", "none"

UNKNOWN = "unknown"
"""A wait status besides the audit's three: the machine code could not be judged."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Whether a kernel's machine code waits for the grids before it.

    `status` is the audit's ``no-wait``, ``access-before-wait`` or ``wait-present``, or ``unknown``;
    `access` its first access to global memory without a wait, None where there is none; `how` says
    what was looked at, or why nothing could be.
    """

    status: str
    access: str | None = None
    how: str = ""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch of one kernel. None stands for what could not be seen.

    `name` is mangled as in the cubin; grid in blocks, block in threads, `shared` dynamic shared
    memory in bytes; `pdl` whether programmatic stream serialization was asked for; `digest` the
    SHA-256 of its machine-code words; `arguments` a hash of its arguments' bytes.
    """

    name: str
    grid: tuple[int, ...] | None = None
    block: tuple[int, ...] | None = None
    shared: int | None = None
    pdl: bool | None = None
    cooperative: bool | None = None
    cluster: tuple[int, ...] | None = None
    event: bool | None = None
    """Whether it was launched with a programmatic event, which later launches may wait for."""
    digest: str | None = None
    arguments: int | None = None
    wait: Wait = Wait(UNKNOWN)

    @property
    def code(self) -> tuple[str, str | None]:
        """What tells its machine code from others'."""
        return self.name, self.digest

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.grid, self.block, self.shared, self.pdl, self.cooperative, self.cluster


@dataclass(frozen=True, slots=True)
class Census:
    """The kernels that one piece of work launched, in order.

    `source` is ``cupti``, ``profiler`` (names only) or ``none``; `notes` says what could not be
    seen; `graphs` counts CUDA graphs that were launched: their kernels are not among `kernels`.
    """

    kernels: tuple[Kernel, ...]
    source: str
    graphs: int = 0
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str | None:
        """One code digest over all kernels, as `codedigest.total`; None if any is unknown."""
        words = {kernel.digest for kernel in self.kernels}
        known = [word for word in words if word is not None]
        return codedigest.total(known) if known and None not in words else None


def plain_kernel(kernel: Kernel, count: int = 1) -> dict[str, Any]:
    """A kernel as JSON data, without what was not seen."""
    found: dict[str, Any] = {"name": kernel.name[:300], "launches": count}
    readable = demangled(kernel.name)
    if readable != kernel.name:
        found["demangled"] = readable[:300]
    for key in ("grid", "block", "cluster"):
        value = getattr(kernel, key)
        if value is not None:
            found[key] = list(value)
    for key in ("shared", "pdl", "cooperative", "event", "digest"):
        value = getattr(kernel, key)
        if value is not None:
            found[key] = value
    if kernel.pdl:
        found["wait"] = kernel.wait.status
        if kernel.wait.access:
            found["first_access"] = kernel.wait.access
        if kernel.wait.how:
            found["how"] = kernel.wait.how
    return found


def names(kernels: Sequence[Kernel]) -> list[str]:
    """Different names, in order of first appearance, readable."""
    return list(dict.fromkeys(demangled(kernel.name) for kernel in kernels))
