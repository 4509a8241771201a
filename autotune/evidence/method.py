"""Which code made the evidence: a digest of the modules of fp4tune that run and record a probe."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from ... import __version__

_ROOT = Path(__file__).resolve().parents[2]
_PARTS = ("autotune", "probes")
"""Everything in these: too much rather than too little, since too much costs a probe only."""


@lru_cache(maxsize=1)
def method() -> str:
    """SHA-256 (hex) over fp4tune's version and the source of what measures and judges here.

    Backends that fp4tune brings are part of it; those from elsewhere are part of their environment.
    """
    sha = hashlib.sha256(f"{__version__}\n".encode())
    for part in _PARTS:
        for path in sorted((_ROOT / part).rglob("*.py")):
            sha.update(f"{path.relative_to(_ROOT)}\0".encode())
            sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()
