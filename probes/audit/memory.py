"""What was read out of a cubin, kept by its content: the same bytes are disassembled once.

Files of JSON in the user's cache folder (``XDG_CACHE_HOME``). They hold what `flow.kernels` found,
not verdicts, and are read as untrusted: one that is not as it should be counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path

from ...machine import files
from .sass import SassKernel

MOST_BYTES = 512 << 20
"""Of all that is kept; what was not used for longest goes first."""
_MOST = 64 << 20
"""Bytes of what is kept of one cubin."""
_RULES = ("sass.py", "flow.py", "origins.py", "parameters.py")


@lru_cache(maxsize=1)
def _rules_digest() -> bytes:
    """Changes whenever the same bytes could be read differently."""
    sha = hashlib.sha256()
    for name in _RULES:
        sha.update(Path(__file__).with_name(name).read_bytes())
    return sha.digest()


def key(cubin: bytes, symbols: Sequence[int] = ()) -> str:
    """What the kernels of a cubin, or those at `symbols` of it, are kept by (hex)."""
    asked = ",".join(map(str, symbols)).encode()
    return hashlib.sha256(_rules_digest() + asked + b"\0" + cubin).hexdigest()


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fp4tune" / "audit"


def recall(name: str) -> list[SassKernel] | None:
    """The kernels kept under `name`; None where nothing right is kept."""
    path = folder() / name[:2] / name
    try:
        rows = json.loads(files.text(path, _MOST))
        if not isinstance(rows, list):
            return None
        kernels = [_kernel_of_row(row) for row in rows]
        os.utime(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return kernels


def _kernel_of_row(row: dict) -> SassKernel:
    kinds = {"name": str, "wait": str, "waits": int, "triggers": int, "mma": dict,
             "block_scaled": int, "idle": bool}  # fmt: skip
    if set(row) != {f.name for f in fields(SassKernel)}:
        raise ValueError("other fields than a kernel's")
    if any(not isinstance(row[name], kind) for name, kind in kinds.items()):
        raise ValueError("a field of another type")
    row["unfollowed"], row["doubts"] = tuple(row["unfollowed"]), tuple(row["doubts"])
    return SassKernel(**row)


def remember(name: str, kernels: Sequence[SassKernel]) -> None:
    """Keep them; where that is not possible they are found anew next time."""
    place = folder() / name[:2]
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, path = tempfile.mkstemp(dir=place)
        with os.fdopen(handle, "w") as file:
            json.dump([asdict(kernel) for kernel in kernels], file)
        os.replace(path, place / name)


def tidy() -> None:
    """Delete what was not used for longest, down to MOST_BYTES."""
    found = []
    for path in folder().glob("*/*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    size = sum(s for _, s, _ in found)
    for _, each, path in sorted(found):
        if size <= MOST_BYTES:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        size -= each
