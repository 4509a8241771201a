"""A finished bundle, run once where fp4tune is what the bundle holds of it or nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ...machine.last_words import LastWords
from ...machine.processes import dying_with_parent

SECONDS = 600.0
"""A script that runs for longer hangs."""
_LOOK = 0.1
RAN = (0, 1)
"""Exit codes of a script that made its launches."""

_CLEAN = """
import os, runpy, sys
from importlib.machinery import PathFinder

class Bundled:
    def find_spec(name, path=None, target=None):
        if name != "fp4tune":
            return None
        beside = os.path.join(os.path.dirname(sys.argv[0]), "vendor")
        found = PathFinder.find_spec(name, [beside])
        if found is None:
            raise ModuleNotFoundError("there is no fp4tune here", name=name)
        return found

sys.argv.pop(0)
sys.meta_path.insert(0, Bundled)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def trial(folder: Path, python: str | None = None, seconds: float = SECONDS) -> tuple[int, str]:
    """Run the script of the bundle in `folder`, each launch once: its exit code, minus the signal
    that ended it, and what it said last.

    The interpreter is isolated, finds no fp4tune but the bundle's own, and starts from a folder
    that holds nothing. A script that does not end in `seconds` is ended: minus SIGALRM.
    """
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FP4TUNE_"))}
    command = [python or sys.executable, "-I", "-c", _CLEAN, str(folder / "reproduce.py")]
    with tempfile.TemporaryDirectory() as empty, LastWords() as words:
        process = subprocess.Popen(
            [*command, "--times", "1"],
            env=bare,
            cwd=empty,
            stdin=subprocess.DEVNULL,
            stdout=words.fd,
            stderr=words.fd,
            start_new_session=True,
            preexec_fn=dying_with_parent(),
        )
        words.begun()
        deadline = time.monotonic() + seconds
        while (code := process.poll()) is None and time.monotonic() < deadline:
            words.listen(_LOOK)
        if code is None:
            code = -signal.SIGALRM
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has left behind
        process.wait()
        return code, words.line()[:300]
