"""Rows to fill a store with, and other processes to do it in. Quick to import in those."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from fp4tune.cache import publish
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import BucketKey, Candidate, Choice, Environment, Evidence

BUCKET = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 16, 4096, 2048)
ENVIRONMENT = Environment("f" * 64, "marlin", "sm90", {"code": "ab"})
WHAT = ("f" * 64, "marlin", "default", BUCKET)


def start(ledger: Ledger, seed: int = 7) -> str:
    run = ledger.start_run(
        seed=seed, level="quick", profile="strict", device={"gpu": "H200"}, argv=["probe"]
    )
    ledger.add_environment(ENVIRONMENT)
    return run


def evidence(run: str, **other) -> Evidence:
    return Evidence(run, *WHAT, regime="serial", data="exact", status="passed", **other)


def rows_for(tag: str, n: int = 4096, layers: int = 1, gpu: str = "H200"):
    """A consistent set of choices whose every tactic is `tag`."""
    choices, candidates = [], []
    for layer in range(layers):
        for m_lo, m_hi in ((0, 0), (1, 16), (17, 64)):
            bucket = BucketKey("nvfp4", "bf16", "bf16", 1, m_lo, m_hi, n + 64 * layer, 2048)
            key = ("sm90", gpu, "strict", bucket, "marlin", tag, "marlin")
            choices.append(Choice(*key, "safe", (), 12.5, 100, fingerprint=ENVIRONMENT.fingerprint))
            candidates.append(
                Candidate(*key, "safe", 0, 12.5, 12, 13, fingerprint=ENVIRONMENT.fingerprint)
            )
    return choices, candidates


def put(place: Path, tag: str = "a", **other) -> int:
    return publish.publish(place, *rows_for(tag, **other), [ENVIRONMENT], {"run": tag})


def isolated(code: str, place: Path, *arguments) -> subprocess.CompletedProcess:
    """Run `code` to its end with `place` and `arguments`, where it may mount what it likes.

    Its mounts are its own. Skips the test where nothing can be mounted on `place`.
    """
    import pytest

    place.mkdir(exist_ok=True)
    alone = ("unshare", "-m")
    try:
        mount = [*alone, "mount", "-t", "tmpfs", "none", str(place)]
        tried = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if tried.returncode:
        pytest.skip(f"cannot mount here: {tried.stderr.strip()}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with spawn(code, place, *arguments, prefix=alone, **pipes) as other:
        out, error = other.communicate(timeout=120)
    return subprocess.CompletedProcess(other.args, other.returncode, out, error)


def gone(pids: list[int], within: float = 5.0) -> bool:
    """Whether none of these processes is there any more, or will be in `within` seconds."""
    deadline = time.monotonic() + within
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def spawn(code: str, *arguments, prefix: tuple[str, ...] = (), **other) -> subprocess.Popen:
    """Run `code` in another Python, where this module can be imported."""
    paths = [str(Path(__file__).parent), *[p for p in sys.path if p]]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environ, **other)
