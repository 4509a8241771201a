"""Seconds from the command to the first layer of a default probe, of this checkout and of others.

Each is started with a state of its own and ended when its first layer begins; compiled kernels are
kept between, so only the very first start compiles. Checkouts take turns.

    python benchmarks/first_layer.py --checkout before=PATH --times 3 --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _machine import versions

HERE = Path(__file__).resolve().parent.parent
PROBE = ("--preset", "llama-3.1-8b", "--profile", "sglang")


def seconds(checkout: Path, most: float) -> float | None:
    """Until the line that names the first layer; None where that did not come in `most` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "path"
        link.mkdir()
        (link / "fp4tune").symlink_to(checkout)
        path = os.pathsep.join([str(link), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "fp4tune.cli", "probe", *PROBE, "--state", f"{folder}/s"]
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        found = None
        for line in process.stderr:
            if "layer 1/" in line:
                found = time.monotonic() - start
            if found is not None or time.monotonic() - start > most:
                break
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--most", type=float, default=300.0, help="seconds of one start")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    others = dict(each.split("=", 1) for each in asked.checkout)
    checkouts = {"here": HERE, **{name: Path(path).resolve() for name, path in others.items()}}
    first = seconds(HERE, asked.most)
    taken: dict[str, list[float | None]] = {name: [] for name in checkouts}
    for _ in range(asked.times):
        for name, checkout in checkouts.items():
            taken[name].append(seconds(checkout, asked.most))
            print(name, taken[name][-1], flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    document = {"first_start": first, "seconds": taken, "versions": versions()}
    (asked.out / "first-layer.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
