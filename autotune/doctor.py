"""What is here, what is missing, and what to do about it; nothing is changed."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..cache import state
from ..cache.errors import Missing, StateError, Unusable
from ..cache.ledger import Ledger
from ..cache.snapshot import load
from ..machine.devices import gpus, order_is_certain
from ..machine.driver import DriverSilent

GOOD, NOTE, BAD = "good", "note", "bad"

_BRINGS_TORCH = (
    "where an engine is served, probe in its interpreter: fp4tune probe --python; "
    "elsewhere install the torch that fits this GPU's driver"
)
_WITH_TORCH = "comes with the torch of a GPU: probe in the engine's interpreter, --python"
_BESIDE = "pip install --no-deps {}"
"""What leaves the torch that is here, an engine's perhaps, as it is: a distribution that asks for
torch, or for what torch is built against, is installed without what it asks for."""
_ENGINE = "probe where it is installed: fp4tune probe --python ITS_PYTHON"
"""An engine pins the torch it is served with; it is never installed beside another."""

# distribution: what it is for, whether fp4tune cannot work without it, and what to do
_DISTRIBUTIONS = (
    ("torch", "running and checking", True, _BRINGS_TORCH),
    ("sqlite-utils", "the ledger", True, "pip install sqlite-utils"),
    ("nvidia-ml-py", "finding GPUs", True, "pip install nvidia-ml-py"),
    ("triton", "checks and kernels on a GPU", False, _WITH_TORCH),
    ("flashinfer-python", "the flashinfer-* backends", False, _BESIDE),
    ("nvidia-cudnn-frontend", "cuDNN's FP4 GEMM", False, _BESIDE),
    ("sglang", "the marlin backend", False, _ENGINE),
    ("apache-tvm-ffi", "the marlin backend", False, _BESIDE),
    ("humming-kernels", "the humming backend", False, _BESIDE),
)
_PROGRAMS = (
    ("g++", "torch-compile on a CPU", "install a C++ compiler"),
    ("nvcc", "compiling marlin and humming", "install the CUDA toolkit of torch's CUDA version"),
    ("cuobjdump", "digests of machine code", "pip install nvidia-cuda-cuobjdump"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One thing looked at. `status`: ``good``; ``note``, works without; ``bad``, must be mended."""

    status: str
    what: str
    found: str
    do: str | None = None

    def json(self) -> dict[str, Any]:
        return asdict(self)


def examine(state_dir: Path | None = None) -> list[Line]:
    """Look at the interpreter, packages, compilers, GPUs, environment and state."""
    return [
        Line(GOOD, "python", platform.python_version()),
        *_package_lines(),
        *_programs(),
        *_gpu_lines(),
        *_variables(),
        *_state_lines(state_dir),
    ]


def _package_lines() -> Iterator[Line]:
    for name, purpose, needed, do in _DISTRIBUTIONS:
        try:
            yield Line(GOOD, name, metadata.version(name))
        except metadata.PackageNotFoundError:
            status = BAD if needed else NOTE
            yield Line(status, name, f"not installed ({purpose})", do.format(name))


def _programs() -> Iterator[Line]:
    for name, purpose, do in _PROGRAMS:
        found = shutil.which(name)
        if found:
            yield Line(GOOD, name, found)
        else:
            yield Line(NOTE, name, f"not found ({purpose})", do)


def _gpu_lines() -> Iterator[Line]:
    try:
        found, reason = gpus()
    except DriverSilent as error:
        yield Line(BAD, "GPU", error.sentence, error.do)
        return
    if reason:
        yield Line(NOTE, "GPU", reason, "only CPU backends can be probed here")
    for target in found:
        yield Line(GOOD, target.label, f"{target.name}, {target.device.arch}, {target.uuid}")
    if found and not order_is_certain():
        yield Line(
            NOTE,
            "GPU order",
            "GPUs of several models: CUDA numbers the fastest first, as it alone knows",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by their UUID",
        )


def _variables() -> Iterator[Line]:
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        yield Line(
            BAD,
            "CUDA_LAUNCH_BLOCKING",
            "set: launches wait for each other, which hides races",
            "unset it before probing",
        )


def _state_lines(state_dir: Path | None) -> Iterator[Line]:
    place = state.directory(state_dir)
    if why := _unwritable(os.fspath(place)):
        yield Line(BAD, "state", f"{place} {why}", "choose another with --state or mount it")
    elif who := _others_who_write(os.fspath(place)):
        why = f"{place} can be written by {who}, who can put any choice there"
        yield Line(BAD, "state", why, "chmod go-w it")
    else:
        yield Line(GOOD, "state", str(place))
    holding = [place] if state_dir else state.holding()
    if len(holding) > 1:
        yield Line(
            NOTE,
            "choices.db",
            f"several places hold one: {', '.join(map(str, holding))}",
            f"readers take the first; remove the others or set {state.VARIABLE}",
        )
    for each in holding:
        try:
            stored = load(os.fspath(each / state.CHOICES))
            count = len(stored.tables["choice"])
            yield Line(GOOD, "choices.db", f"generation {stored.generation}, {count} choices")
        except Missing:
            yield Line(NOTE, "choices.db", f"none in {each}", "run fp4tune probe")
        except Unusable as error:
            yield Line(NOTE, "choices.db", str(error), "ask one of these to look at it")
        except StateError as error:
            yield Line(BAD, "choices.db", str(error), "move the file away and probe again")
    if not holding:
        yield Line(NOTE, "choices.db", "none yet", "run fp4tune probe")
    yield from _ledger(place)


def _unwritable(place: str) -> str:
    """Why nothing can be kept in `place`, which is made if need be; empty where it can."""
    there = os.path.abspath(place)
    while not os.path.lexists(there):
        above = os.path.dirname(there)
        try:
            os.listdir(above)
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            return f"cannot be made: {above} is no folder"
        except OSError as error:
            return f"cannot be looked at: {above}: {error.strerror}"
        there = above
    if not os.path.isdir(there):
        return "is no folder" if there == place else f"cannot be made: {there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else "cannot be written"


def _others_who_write(place: str) -> str:
    """Who besides its owner may write to a folder, in words; empty where nobody may."""
    try:
        mode = os.stat(place).st_mode
    except OSError:
        return ""
    return "everyone" if mode & 0o002 else "a group" if mode & 0o020 else ""


def _ledger(place: Path) -> Iterator[Line]:
    again = "probe again: what is damaged is measured anew"
    try:
        with Ledger.open(place, readonly=True) as ledger:
            said = ledger.damage().sentences
            for sentence in said:
                yield Line(NOTE, "ledger.db", sentence, again)
            if not said:
                yield Line(GOOD, "ledger.db", f"{len(ledger.runs())} runs, as they were stored")
    except Missing:
        return
    except Unusable as error:
        yield Line(NOTE, "ledger.db", str(error), "ask one of these to look at it")
    except StateError as error:
        yield Line(BAD, "ledger.db", f"DAMAGED: {error}", "move the file away and probe again")
