"""Kill a real CPU probe, over and over, and check that the store is whole each time.

The promise: whenever ``fp4tune probe`` is killed with SIGKILL, the database opens, no evidence that
was committed is lost, the published choice is absent or whole, no worker lives on, and the next
probe finishes. Each round starts a probe on the same state directory and kills it

* ``anywhere``: at a moment uniform over the time a whole probe takes;
* ``start``: within the first two seconds, while it imports and opens the store;
* ``evidence``: at any moment after it committed its first evidence;
* ``publish``: within 40 ms after it began to join and publish.

Right before the kill another process (this one) reads every committed row through the ledger, and
closes it again, so that the next opening is the one that recovers SQLite's log. Where a publication
is to be hit, in which milliseconds count, it reads them before the probe starts.

    python benchmarks/kill_probe.py --times 100 --out benchmarks/results/kill-probe-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fp4tune.cache import snapshot, state
from fp4tune.cache.errors import Missing, StateError
from fp4tune.cache.ledger import Ledger

Rows = dict[tuple[str, int], str]

MARK = "KILL_PROBE_MARK"
"""A variable every descendant of a probe inherits: it finds them after their parent is gone."""
DEATH = 5.0
"""Seconds all workers and what they started may take to end."""
PUBLISH_LOCK = "locks/join.lock"
SHAPE = ("--gpu", "none", "--shape", "256,256", "--max-m", "1", "--activation", "bf16")


@dataclass(frozen=True, slots=True)
class Round:
    """One kill and what was found after it."""

    mode: str
    seconds: float
    """From the start of the probe to its kill."""
    seen: int
    """Committed rows read before the kill."""
    lost: int
    """Of those, rows that are gone or differ afterwards."""
    run: str | None
    """What the killed run is recorded as; None where it was killed before it had begun."""
    generation: int
    """What is published afterwards; 0 for nothing."""
    died_in: float
    faults: tuple[str, ...]


def main() -> int:
    arguments = _arguments()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="fp4tune-kill-") as folder:
        place, other = Path(folder, "state"), Path(folder, "calibration")
        # Compiled code is kept over all rounds, so that damage to it would show, too.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
        whole = arguments.seconds
        if whole is None:
            _whole(other, arguments.backend)  # fills that cache
            whole = _whole(other, arguments.backend)["seconds"]
        print(f"a whole probe takes {whole:.1f} s", flush=True)
        rounds: list[Round] = []
        finished_first = 0
        while len(rounds) < arguments.times:
            mode = _mode(rng)
            found = _round(place, arguments.backend, mode, whole, rng)
            if found is None:
                finished_first += 1
                continue
            rounds.append(found)
            _print(len(rounds), found)
        last = _whole(place, arguments.backend)
        bad = _check(place, {})[1] + ([] if last["exit_code"] == 0 else ["the last probe failed"])
    result = {
        "what": "kill -9 of fp4tune probe at random moments",
        "probe": " ".join(("fp4tune probe", *SHAPE, *_backends(arguments.backend))),
        "whole_probe_seconds": round(whole, 2),
        "seed": arguments.seed,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": _machine(),
        "kills": len(rounds),
        "kills_by_mode": dict(Counter(r.mode for r in rounds)),
        "runs_recorded_as": dict(Counter(str(r.run) for r in rounds)),
        "finished_before_the_kill": finished_first,
        "rows_read_before_kills": sum(r.seen for r in rounds),
        "rows_lost": sum(r.lost for r in rounds),
        "slowest_death_seconds": round(max(r.died_in for r in rounds), 3),
        "rounds_with_faults": sum(bool(r.faults) for r in rounds),
        "last_probe": last,
        "faults": [*(fault for r in rounds for fault in r.faults), *bad],
        "rounds": [asdict(r) for r in rounds],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))
    return 1 if result["faults"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, help="how long a whole probe takes; default: measured first"
    )
    parser.add_argument("--backend", action="append", help="default: torch-dequant, torch-compile")
    arguments = parser.parse_args()
    arguments.backend = arguments.backend or ["torch-dequant", "torch-compile"]
    return arguments


def _mode(rng: random.Random) -> str:
    return rng.choices(("anywhere", "start", "evidence", "publish"), (30, 10, 40, 20))[0]


def _backends(names: list[str]) -> list[str]:
    return [part for name in names for part in ("--backend", name)]


def _start(place: Path, backends: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """A probe on its way, and the mark its descendants carry."""
    mark = secrets.token_hex(8)
    command = [sys.executable, "-m", "fp4tune.cli", "probe", "--state", str(place), *SHAPE]
    # A probe that finds all it asks for in the ledger would be over before it could be killed.
    command += ["--level", "quick", "--profile", "strict", "--again", *_backends(backends)]
    log = (place.parent / "probe.log").open("wb")
    with log:
        probe = subprocess.Popen(command, env=os.environ | {MARK: mark}, stdout=log, stderr=log)
    return probe, mark


def _whole(place: Path, backends: list[str]) -> dict[str, Any]:
    """A probe that nobody kills. Raises RuntimeError with its words where it does not finish."""
    start = time.monotonic()
    probe, mark = _start(place, backends)
    code = probe.wait()
    seconds = time.monotonic() - start
    if code not in (0, 1):
        raise RuntimeError((place.parent / "probe.log").read_text())
    generation = snapshot.load(str(place / state.CHOICES)).generation
    left = len(_marked(mark))
    return {
        "exit_code": code,
        "seconds": round(seconds, 2),
        "generation": generation,
        "processes_left": left,
    }


def _round(
    place: Path, backends: list[str], mode: str, whole: float, rng: random.Random
) -> Round | None:
    """Start, kill and check; None where the probe was done before its time came."""
    moment = rng.uniform(0.0, min(2.0, whole) if mode == "start" else whole)
    jitter = rng.uniform(0.0, 0.04)
    first = _last_evidence(place)
    runs, seen = _runs(place), _committed(place)
    start = time.monotonic()
    probe, mark = _start(place, backends)
    if mode == "publish":
        _wait_for_publication(place, probe)
        time.sleep(jitter)
    else:
        if mode == "evidence":
            while _last_evidence(place) == first and probe.poll() is None:
                time.sleep(0.01)
            moment = time.monotonic() - start + rng.uniform(0.0, 0.6 * whole)
        while time.monotonic() - start < moment and probe.poll() is None:
            time.sleep(0.001)
        seen = _committed(place)
    if probe.poll() is not None:
        return None
    probe.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    probe.wait()
    faults = []
    while left := _marked(mark):
        if time.monotonic() - killed > DEATH:
            faults.append(f"{len(left)} processes still live: {', '.join(left.values())}")
            _end(left)
            break
        time.sleep(0.01)
    died_in = time.monotonic() - killed
    lost, found, generation = _check(place, seen)
    new = [status for run, status in _runs(place).items() if run not in runs]
    if "running" in new or "failed" in new:
        faults.append(f"the killed run is recorded as {new}")
    return Round(
        mode,
        round(killed - start, 3),
        len(seen),
        lost,
        new[0] if new else None,
        generation,
        round(died_in, 3),
        (*faults, *found),
    )


def _wait_for_publication(place: Path, probe: subprocess.Popen[bytes]) -> None:
    """Until this probe takes the publication's lock: it then writes its number there."""
    lock = place / PUBLISH_LOCK
    while probe.poll() is None:
        try:
            if lock.read_text().strip() == str(probe.pid):
                return
        except OSError:
            pass
        time.sleep(0.0005)


def _committed(place: Path) -> Rows:
    """Every committed row, by table and id; none where the ledger is still to be made."""
    try:
        with Ledger.open(place, readonly=True) as ledger:
            rows = {
                (name, row.id or 0): repr(row)
                for name in ("evidence", "findings", "timings", "verdicts", "builds")
                for row in getattr(ledger, name)()
            }
            done = (g for g in ledger.generations() if g.status == "published")
            return rows | {("generation", g.number): repr(g) for g in done}
    except Missing:
        return {}


def _last_evidence(place: Path) -> int:
    """The id of the newest row of evidence, 0 for none; cheap enough to ask all the time."""
    try:
        with closing(sqlite3.connect(f"file:{place / state.LEDGER}?mode=ro", uri=True)) as conn:
            return conn.execute("SELECT coalesce(max(id), 0) FROM evidence").fetchone()[0]
    except sqlite3.Error:
        return 0


def _runs(place: Path) -> dict[str, str]:
    """Every run and its status, as the next writer finds them."""
    if not (place / state.LEDGER).exists():
        return {}
    with Ledger.open(place) as ledger:
        return {run.id: run.status for run in ledger.runs()}


def _check(place: Path, seen: Rows) -> tuple[int, list[str], int]:
    """How many of the rows seen are lost, what else is wrong, and the published generation."""
    faults = []
    path = place / state.LEDGER
    if path.exists():
        try:
            Ledger.open(place).close()
            with closing(sqlite3.connect(path)) as conn:
                answer = conn.execute("PRAGMA integrity_check").fetchone()[0]
                wrong = conn.execute("PRAGMA foreign_key_check").fetchall()
            if answer != "ok" or wrong:
                faults.append(f"the ledger's integrity check says {answer}, {wrong}")
        except (StateError, sqlite3.Error) as error:
            faults.append(f"the ledger does not open: {error}")
    now = _committed(place)
    lost = sum(now.get(key) != row for key, row in seen.items())
    if lost:
        faults.append(f"{lost} committed rows are lost")
    generation = 0
    try:
        generation = snapshot.load(str(place / state.CHOICES)).generation
    except Missing:
        pass
    except StateError as error:
        faults.append(f"choices.db does not load: {error}")
    if any(table == "generation" and number > generation for table, number in seen):
        faults.append("a published generation is gone")
    return lost, faults, generation


def _marked(mark: str) -> dict[int, str]:
    """Living processes that carry the mark, with their command lines."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = command.decode(errors="replace")[:200]
        except OSError:
            continue
    return found


def _end(processes: dict[int, str]) -> None:
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _machine() -> dict[str, Any]:
    cpu = platform.machine()
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return {
        "cpu": names[0] if names else cpu,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "sqlite": sqlite3.sqlite_version,
    }


def _print(number: int, found: Round) -> None:
    print(
        f"{number:4d} {found.mode:8s} killed at {found.seconds:6.2f} s: {found.seen} rows seen, "
        f"{found.lost} lost, run {found.run}, generation {found.generation}, "
        f"all dead in {found.died_in:.2f} s{''.join('; ' + fault for fault in found.faults)}",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
