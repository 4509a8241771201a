"""``kill -9`` of a probe of several layers, again and again: what is lost, or made twice?

A real probe on the CPU, of several layers and two small backends of a file, one of them wrong. Each
round starts it on the same state directory and kills it at a random moment: anywhere, as soon as it
has finished one more step, or while it publishes. After each kill the ledger opens and is whole, no
row that was committed is gone, the steps that are finished are those of before and more, none was
made twice, and no process lives on. At the end a probe that nobody kills finishes, and says of
every bucket what one in a fresh state says.

    python benchmarks/trust_kill.py --out benchmarks/results/trust [--kills 60 --layers 4]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from _machine import machine, processes, write

from fp4tune.autotune.steps import BEGUN
from fp4tune.cache import snapshot, state
from fp4tune.cache.errors import Missing
from fp4tune.cache.ledger import Ledger

MARK = "TRUST_KILL_MARK"
LAYERS = ((128, 256), (192, 256), (256, 256), (128, 512), (192, 512), (256, 512))
MODES = ("anywhere", "after a step", "while publishing")
BACKEND = """
from fp4tune.probes.zoo.floor import Right

class It(Right):
    def __init__(self):
        super().__init__({name!r})

    def run(self, state, a, out, tactic):
        super().run(state, a, out, tactic)
        if {wrong} and a.shape[0]:
            out[0, 3] += 1000
"""


class Killing:
    """A state directory, the probe that is killed there, and what came of it."""

    state: Path

    def __init__(self, place: Path, layers: int, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.lives = 0
        self.faults: list[str] = []
        self.rounds: list[dict[str, Any]] = []
        self.rows: dict[tuple[str, int], str] = {}
        self.finished: Counter[tuple[Any, ...]] = Counter()
        self.command = [sys.executable, "-m", "fp4tune.cli", "probe", "--gpu", "none", "--json"]
        self.command += ["--max-m", "1", "--level", "quick", "--profile", "strict"]
        self.command += ["--activation", "bf16"]
        for n, k in LAYERS[:layers]:
            self.command += ["--shape", f"{n},{k}"]
        for name in ("right", "wrong"):
            file = place / f"{name}.py"
            file.write_text(textwrap.dedent(BACKEND.format(name=name, wrong=name == "wrong")))
            self.command += ["--backend", f"{file}:It"]

    def begin(self) -> None:
        """A state directory that nothing was probed in."""
        self.lives += 1
        self.state = self.place / f"state-{self.lives}"
        self.rows.clear()
        self.finished = Counter()

    def end(self, expected: set[tuple[Any, ...]]) -> float:
        """Have a probe finish what was killed, and compare; its seconds."""
        said, seconds = self.whole(self.state)
        self.look("at the end")
        if said != expected:
            self.faults.append(f"what is said differs: {sorted(said ^ expected)[:4]}")
        return seconds

    def start(self, where: Path) -> tuple[subprocess.Popen[bytes], str]:
        mark = secrets.token_hex(8)
        environ = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
        with (self.place / "answer").open("wb") as out, (self.place / "log").open("wb") as log:
            command = [*self.command, "--state", str(where)]
            return subprocess.Popen(command, env=environ, stdout=out, stderr=log), mark

    def whole(self, where: Path) -> tuple[set[tuple[Any, ...]], float]:
        """A probe that nobody kills: what it says of each bucket, and its seconds."""
        began = time.monotonic()
        probe, _ = self.start(where)
        if probe.wait() not in (0, 1):
            raise RuntimeError((self.place / "log").read_text()[-2000:])
        (report,) = json.loads((self.place / "answer").read_text())
        said = {
            (c["backend"], c["bucket"]["n"], c["bucket"]["k"], c["bucket"]["m_hi"], c["verdict"])
            for c in report["candidates"]
        }
        return said, time.monotonic() - began

    def count(self, sql: str) -> int:
        try:
            uri = f"file:{self.state / state.LEDGER}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True)) as conn:
                return int(conn.execute(sql).fetchone()[0])
        except sqlite3.Error:
            return 0

    def steps(self) -> int:
        return self.count(f"SELECT count(*) FROM step WHERE what != '{BEGUN}'")

    def kill(self, mode: str, seconds: float) -> bool:
        """One round; False where the probe was done before its time came."""
        began = time.monotonic()
        moment = self.random.uniform(0, seconds / 2)
        wanted = self.steps() + self.random.choice((1, 1, 2, 5, 15, 40))
        probe, mark = self.start(self.state)
        while probe.poll() is None:
            if mode == "anywhere" and time.monotonic() - began > moment:
                break
            if mode == "after a step" and self.steps() >= wanted:
                break
            if mode == "while publishing" and self._publishes(probe.pid):
                time.sleep(self.random.uniform(0, 0.04))
                break
            time.sleep(0.001)
        if probe.poll() is not None:
            return False
        probe.send_signal(signal.SIGKILL)
        probe.wait()
        killed = time.monotonic()
        while left := list(processes(**{MARK: mark})):
            if time.monotonic() - killed > 10:
                self.faults.append(f"{len(left)} processes live on")
                for pid, _ in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        before = sum(self.finished.values())
        self.look(mode)
        self.rounds.append({
            "mode": mode, "seconds": round(killed - began, 2),
            "steps_more": sum(self.finished.values()) - before, "rows": len(self.rows),
        })  # fmt: skip
        print(json.dumps(self.rounds[-1]), flush=True)
        return True

    def _publishes(self, pid: int) -> bool:
        try:
            return Path(state.lock_file(self.state, "join")).read_text().strip() == str(pid)
        except OSError:
            return False

    def look(self, mode: str) -> None:
        """Everything that must hold after a kill."""
        try:
            with Ledger.open(self.state) as ledger:
                rows = {
                    (name, row.id or 0): repr(row)
                    for name in ("evidence", "findings", "timings", "verdicts", "steps", "probed")
                    for row in getattr(ledger, name)()
                }
                steps = [row for row in ledger.steps() if row.what != BEGUN]
                self.faults += ledger.damage().sentences
                living = {run.status for run in ledger.runs()} - {"interrupted", "finished"}
        except Missing:
            return
        if living:
            self.faults.append(f"a killed run is {living}")
        if lost := sum(rows.get(key) != row for key, row in self.rows.items()):
            self.faults.append(f"{lost} rows are lost after a kill {mode}")
        finished = Counter(
            (s.backend, s.bucket.n, s.bucket.k, s.what, s.detail["launches"], *item)
            for s in steps
            for item in map(tuple, s.detail["items"])
        )
        if self.finished - finished:
            self.faults.append(f"finished steps are gone after a kill {mode}")
        if twice := [key for key, count in finished.items() if count > 1]:
            self.faults.append(f"{len(twice)} steps were made twice, {twice[0]}")
        self.rows, self.finished = rows, finished
        with suppress(Missing):
            snapshot.load(str(self.state / state.CHOICES))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fp4tune-trust-") as folder:
        killing = Killing(Path(folder), arguments.layers, arguments.seed)
        expected, seconds = killing.whole(Path(folder, "fresh"))
        print(f"a whole probe takes {seconds:.1f} s", flush=True)
        last = []
        killing.begin()
        while len(killing.rounds) < arguments.kills:
            mode = killing.random.choices(MODES, (30, 60, 10))[0]
            if not killing.kill(mode, seconds):
                last.append(killing.end(expected))  # it was done, and begins anew
                killing.begin()
        last.append(killing.end(expected))
    result = {
        "what": "kill -9 of a probe of several layers, with resuming",
        "machine": machine(),
        "seed": arguments.seed,
        "layers": arguments.layers,
        "kills": len(killing.rounds),
        "whole_probe_seconds": round(seconds, 1),
        "states": killing.lives,
        "last_probes_seconds": [round(each, 1) for each in last],
        "rounds_without_a_step": sum(not r["steps_more"] for r in killing.rounds),
        "faults": killing.faults,
        "rounds": killing.rounds,
        "seconds": round(time.monotonic() - began, 1),
    }
    write(arguments.out / "kill.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))
    return 1 if killing.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
