"""The daemon on a full disk, under a wall clock that jumps, and with a ledger that a disk changes.

Its state lies on a small tmpfs in a mount namespace of its own. By turns: the disk is filled (and
the daemon killed and started anew on it, and choices.db removed), the clock is put forward and back
by up to 400 days, a row of the ledger is changed. All the while /healthz and /v1/choices are asked
for ten times a second: how many were answered with what, after how long; and how long it took to
be ready once there is room, to put choices.db back, and to say that the ledger is damaged.

    python benchmarks/trust_daemon.py --out benchmarks/results/trust [--rounds 20]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import _clock
import _node as node
from _machine import machine, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from stores import evidence, put
from stores import start as start_run

from fp4tune.cache import state
from fp4tune.cache.ledger import Ledger

INSIDE = "TRUST_DAEMON_INSIDE"
SIZE = "16m"
LATE = 120.0
"""Seconds after which what should come is given up; the machine may be busy."""


class Trial:
    """A daemon on a small disk, and what those who ask it got."""

    def __init__(self, place: Path, seed: int) -> None:
        self.random, self.place = random.Random(seed), place
        self.state, self.clock = place / "state", place / "clock"
        self.state.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(self.state)]
        subprocess.run(mount, check=True)
        put(self.state, "kept")
        with Ledger.open(self.state) as ledger:
            run = start_run(ledger)
            ledger.add_all([evidence(run, launches=9) for _ in range(20)])
            ledger.finish_run(run)
        listen = f"unix:{place}/d.sock"
        config = place / "daemon.toml"
        config.write_text(
            f'state = "{self.state}"\ngpus = ["none"]\n[watch]\nseconds = 1\n'
            f'[http]\nlisten = "{listen}"\n'
        )
        _clock.jump(self.clock, 0)
        library = _clock.library(place)
        moved = _clock.variables(library, self.clock) if library else {}
        self.jumps = library is not None
        self.daemon = node.Daemon(config, listen, node.environ(**moved), place / "daemon.log")
        self.faults: list[str] = []
        self.took: dict[str, list[float]] = {}
        self.asked: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.down = threading.Event()
        """Set while nobody can answer, since the daemon was killed."""
        self.over = threading.Event()

    def asking(self) -> None:
        while not self.over.wait(0.1):
            for path in ("/healthz", "/v1/choices"):
                away, began = self.down.is_set(), time.monotonic()
                status, document = self.daemon.get(path, 30)
                if away or self.down.is_set():
                    continue
                self.seconds.append(time.monotonic() - began)
                self.asked[f"{path} {status}"] += 1
                if status != 200:
                    self.faults.append(f"{path} was answered with {status}")
                elif path == "/v1/choices" and not document["choices"]:
                    self.faults.append("/v1/choices was empty")

    def until(self, what: str, path: str, want: Any) -> None:
        try:
            took, _ = self.daemon.until(path, want, LATE)
            self.took.setdefault(what, []).append(round(took, 2))
        except TimeoutError as error:
            self.faults.append(f"{what}: {error}")

    def ready(self, what: str) -> None:
        self.until(what, "/readyz", lambda status, _: status == 200)

    def fill(self) -> None:
        with suppress(OSError), open(self.state / "filler", "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * (1 << 16))

    def full(self) -> None:
        """A full disk: served on, started on it, and choices.db put back on it."""
        self.fill()
        time.sleep(3)
        self.down.set()
        self.daemon.kill()
        self.daemon.start()
        self.until("serves again on a full disk", "/v1/choices", lambda s, d: s and d["choices"])
        self.down.clear()
        # Ready it is when it could compare what is published, which takes a ledger it can write.
        (self.state / state.CHOICES).unlink()
        began = time.monotonic()
        while not (self.state / state.CHOICES).exists():
            if time.monotonic() - began > LATE:
                self.faults.append("choices.db was not put back on a full disk")
                break
            time.sleep(0.05)
        self.took.setdefault("choices.db put back on a full disk", []).append(
            round(time.monotonic() - began, 2)
        )
        (self.state / "filler").unlink()
        self.ready("ready after it")

    def jump(self) -> None:
        _clock.jump(self.clock, _clock.somewhere(self.random))
        time.sleep(3)
        self.ready("ready after a jump")

    def change(self) -> None:
        """A row of the ledger changed behind its back."""
        with closing(sqlite3.connect(self.state / state.LEDGER, timeout=30)) as conn, conn:
            number = self.random.randrange(1, 21)
            sql = "UPDATE evidence SET launches = launches + 1 WHERE id = ?"
            conn.execute(sql, (number,))
        self.until("said to be damaged", "/healthz", lambda s, d: s == 200 and d["damaged"])


def inside(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fp4tune-trust-") as folder:
        trial = Trial(Path(folder), arguments.seed)
        trial.daemon.start()
        trial.ready("ready at the start")
        asking = threading.Thread(target=trial.asking)
        asking.start()
        try:
            for number in range(arguments.rounds):
                trial.full()
                if trial.jumps:
                    trial.jump()
                if number == arguments.rounds - 1:
                    trial.change()
                print(f"round {number + 1}: {len(trial.faults)} faults", flush=True)
        finally:
            trial.over.set()
            asking.join()
            code, took = trial.daemon.stop()
            subprocess.run(["umount", str(trial.state)])
        if code:
            trial.faults.append(f"the daemon ended with code {code}")
        if "Traceback" in (trial.place / "daemon.log").read_text():
            trial.faults.append("there is a traceback in the daemon's log")
        return {
            "rounds": arguments.rounds,
            "clock_jumps": arguments.rounds if trial.jumps else "there is no C compiler",
            "asked": dict(trial.asked),
            "answers_seconds": {
                "median": round(statistics.median(trial.seconds), 4),
                "slowest": round(max(trial.seconds), 3),
            },
            "took_seconds": {
                what: {"median": statistics.median(each), "slowest": max(each)}
                for what, each in trial.took.items()
            },
            "ended_in_seconds": round(took, 2),
            "faults": trial.faults[:50],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if not os.environ.get(INSIDE):
        command = ["unshare", "-m", sys.executable, *sys.argv]
        return subprocess.run(command, env={**os.environ, INSIDE: "1"}).returncode
    began = time.monotonic()
    found = inside(arguments)
    result = {
        "what": "the daemon on a full disk, under clock jumps, with a changed ledger",
        "machine": machine(),
        "seed": arguments.seed,
        **found,
        "seconds": round(time.monotonic() - began, 1),
    }
    write(arguments.out / "daemon.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
