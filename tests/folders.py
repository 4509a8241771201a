"""The environment of tests, set before anything is imported that reads it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# Read when torch is loaded, here and in every worker. Several tests run at a time, each with
# processes of its own: threads that spin until there is work would take the cores from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Each process of a run would compile all that it imports anew: 1.4 s of our own, 10 s of the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def _kept() -> Path:
    """A folder for compiled code, kept from one run to the next: in this environment, where that is
    a virtual one of ours."""
    place = Path(sys.prefix) / "cache"
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        return place
    return Path(tempfile.gettempdir()) / f"fp4tune-tests-{os.getuid()}"


# Nothing is written to the user's own folders, nor read from the places that a node's state is in.
CACHE = _kept()
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(CACHE))
# Set by whoever runs tests in several processes; lines are as wide as it says.
os.environ.pop("COLUMNS", None)
os.environ["XDG_STATE_HOME"] = str(CACHE / "no-state")
os.environ["FP4TUNE_STATE"] = str(CACHE / "no-state" / "named")
for _name in ("FP4TUNE_SPOOL", "FP4TUNE_GENERATION", "FP4TUNE_CONFIG"):
    os.environ.pop(_name, None)
