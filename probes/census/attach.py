"""Attaching this process to CUPTI and taking a census of what a callable launches.

Code is only seen while it is loaded, so a worker attaches before CUDA starts and stays attached
while backends are prepared and graded. It detaches before anything is timed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .. import settings
from .code import CodeBook
from .kernels import CUPTI, NONE, Census, Kernel
from .profiler import profiled
from .shim import CannotSee, RawLaunch, Shim

VARIABLE = "FP4TUNE_CENSUS"
"""``0`` in it leaves CUPTI alone: nothing is attached, and a census sees nothing."""
_PDL, _COOPERATIVE, _CLUSTER, _EVENT = 1, 2, 4, 8


@dataclass(slots=True)
class _Process:
    """CUPTI has one subscriber in a process, so this is one, too."""

    shim: Shim | None = None
    why: str = ""
    book: CodeBook = field(default_factory=CodeBook)
    blobs: int = 0
    functions: int = 0


_process = _Process()
_one_at_a_time = threading.RLock()


def off() -> bool:
    return settings.value(VARIABLE) == "0"


def attach() -> str | None:
    """Record from now on what is loaded; None, or why that cannot be, in one sentence."""
    with _one_at_a_time:
        if off():
            return f"{VARIABLE}=0"
        try:
            if _process.shim is None:
                _process.shim = Shim()
            if not _process.shim.is_open:
                _process.shim.open()
        except CannotSee as error:
            _process.why = str(error)
            return _process.why
        return None


def detach() -> None:
    """Leave nothing of CUPTI's in the way of what runs next."""
    with _one_at_a_time:
        if _process.shim is not None and _process.shim.is_open:
            _learn(_process.shim)
            _process.shim.close()


def leave() -> None:
    """Detach, and end CUPTI, so that memory of the host that grows is not its own.

    The device must be idle. `attach` and `census` work again afterwards.
    """
    with _one_at_a_time:
        detach()
        if _process.shim is not None:
            _process.shim.finalize()


def attached() -> bool:
    return _process.shim is not None and _process.shim.is_open


def census(run: Callable[[], None]) -> Census:
    """What `run` launches on the CUDA devices of this process, in order.

    `run` is called once, eagerly or inside a capture of its own, and the device waited for. Raises
    what `run` raises. Without CUDA the census is empty, with a note.
    """
    if not torch.cuda.is_available():
        run()
        return Census((), NONE, notes=("there is no CUDA device",))
    with _one_at_a_time:
        was = attached()
        why = attach()
        shim = _process.shim
        try:
            if why is None and shim is not None:
                shim.clear()
                shim.watch(True)
        except CannotSee as error:
            why = str(error)
        if why is not None or shim is None:
            if off():
                run()
                return Census((), NONE, notes=(str(why),))
            return profiled(run, str(why))
        try:
            run()
            torch.cuda.synchronize()
        finally:
            if not was:
                detach()
            else:
                shim.watch(False)
        return _take_census(shim)


def _learn(shim: Shim) -> None:
    counts = shim.counts()
    _process.book.add(shim.take_blobs(_process.blobs), shim.functions(_process.functions))
    _process.blobs, _process.functions = counts.blobs, counts.functions


def _take_census(shim: Shim) -> Census:
    _learn(shim)
    counts, book = shim.counts(), _process.book
    launches = [raw for raw in shim.launches() if raw.result == 0]
    for name, raw in {raw.name: raw for raw in launches if raw.arguments is None}.items():
        # Known from the next time on: sizes stand in the code, which was just seen.
        sizes = book.parameters(raw)
        if sizes is not None:
            shim.sizes(name, sizes)
    notes = [
        f"{lost} {what} did not fit into the census's records"
        for lost, what in (
            (counts.lost_launches, "launches"),
            (counts.lost_functions, "functions"),
            (counts.lost_blobs, "loaded modules"),
        )
        if lost
    ]
    if counts.graphs:
        notes.append(f"{counts.graphs} CUDA graphs were launched, whose kernels were not seen")
    kernels = tuple(kernel(raw, book) for raw in launches)
    unknown = sum(k.digest is None for k in kernels)
    if unknown:
        notes.append(f"the machine code of {unknown} of {len(kernels)} launches was not seen")
    return Census(kernels, CUPTI, int(counts.graphs), tuple(notes))


def kernel(raw: RawLaunch, book: CodeBook) -> Kernel:
    """A launch as a value; its wait is looked up only where it was launched with PDL."""
    pdl = bool(raw.flags & _PDL)
    found = Kernel(
        name=raw.name,
        grid=raw.grid,
        block=raw.block,
        shared=raw.shared,
        pdl=pdl,
        cooperative=bool(raw.flags & _COOPERATIVE),
        cluster=raw.cluster if raw.flags & _CLUSTER else None,
        event=bool(raw.flags & _EVENT),
        digest=book.digest(raw),
        arguments=raw.arguments,
    )
    return replace(found, wait=book.wait(raw)) if pdl else found
