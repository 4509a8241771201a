"""Publications under load: does any reader ever see anything but one whole generation?

Publishers are processes that publish one after another and are killed and started anew (``kill -9``
at random moments). Meanwhile readers, as many as there are cores and a few more, ask without a
pause: some opened once, some opened anew each time. Every answer must be of one generation, each
row of it of the same publication, and generations only rise. Half of the publishers live with a
wall clock that jumps by up to 400 days. At the end rollback brings back what was published.

    python benchmarks/trust_publish.py --out benchmarks/results/trust [--seconds 300]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _clock
from _machine import machine, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from stores import put

from fp4tune.cache import publish, reader
from fp4tune.cache.ledger import Ledger

TESTS = str(Path(__file__).resolve().parent.parent / "tests")
LAYERS = 40
PUBLISHER = """
import itertools, os, sys
from pathlib import Path
from stores import put
for i in itertools.count():
    os.write(1, b"%d\\n" % put(Path(sys.argv[1]), f"{sys.argv[2]}-{i}", layers=LAYERS))
"""
READER = """
import os, random, sys, time
from fp4tune.cache import reader
place, anew, end = sys.argv[1], sys.argv[2] == "anew", time.monotonic() + float(sys.argv[3])
found, last, count, wrong = reader.open(place), 0, 0, []
while time.monotonic() < end:
    if anew:
        found = reader.open(place)
    generation = found.generation
    tags = {
        found.choose(m, 4096 + 64 * layer, 2048).tactic
        for layer in random.sample(range(LAYERS), 5) for m in (0, 3, 20)
    }
    count += 15
    if found.generation == generation and len(tags) != 1:
        wrong.append(f"generation {generation} says {sorted(map(str, tags))}")
    if generation < last:
        wrong.append(f"generation {generation} after {last}")
    last = generation
print(count, last, *wrong[:5], sep="\\n")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--publishers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    cores = len(os.sched_getaffinity(0))
    faults: list[str] = []
    published, killed, jumps = 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="fp4tune-trust-") as folder:
        place, clock = Path(folder, "state"), Path(folder, "clock")
        _clock.jump(clock, 0)
        library = _clock.library(Path(folder))
        put(place, "first", layers=LAYERS)
        path = os.pathsep.join([TESTS, *(p for p in sys.path if p)])
        environ = {**os.environ, "PYTHONPATH": path}
        moved = {**environ, **(_clock.variables(library, clock) if library else {})}

        def publisher(number: int) -> subprocess.Popen[bytes]:
            code = PUBLISHER.replace("LAYERS", str(LAYERS))
            env = moved if number % 2 else environ
            return subprocess.Popen(
                [sys.executable, "-c", code, str(place), str(number)],
                env=env, stdout=subprocess.PIPE,
            )  # fmt: skip

        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READER.replace("LAYERS", str(LAYERS)), str(place),
                 "anew" if number % 2 else "once", str(arguments.seconds)],
                env=environ, stdout=subprocess.PIPE, text=True,
            )
            for number in range(cores + 2)
        ]  # fmt: skip
        running = {number: publisher(number) for number in range(arguments.publishers)}
        end = time.monotonic() + arguments.seconds
        last = 0
        while time.monotonic() < end:
            victim = rng.randrange(arguments.publishers)
            select.select([running[victim].stdout], [], [], 5)
            time.sleep(rng.uniform(0, 0.5))
            running[victim].kill()
            said = running[victim].communicate()[0].rpartition(b"\n")[0].split()
            killed += 1
            published += len(said)
            last = max([last, *map(int, said)])
            if reader.open(place).generation < last:
                faults.append(f"generation {last} was said to be published, and is not")
            running[victim] = publisher(killed * arguments.publishers + victim)
            if library:
                _clock.jump(clock, _clock.somewhere(rng))
                jumps += 1
        for each in running.values():
            each.kill()
            each.wait()
        reads = 0
        for each in readers:
            out, _ = each.communicate(timeout=120)
            if each.returncode:
                faults.append(f"a reader ended with code {each.returncode}")
                continue
            count, _, *wrong = out.splitlines()
            reads += int(count)
            faults += wrong
        final = reader.open(place)
        before = final.choose(3, 4096, 2048).tactic
        newest = put(place, "newest", layers=LAYERS)
        back = publish.rollback(place)
        again = reader.open(place)
        if not back > newest > final.generation or again.choose(3, 4096, 2048).tactic != before:
            faults.append(f"rollback to {before} came to {again.choose(3, 4096, 2048).tactic}")
        with Ledger.open(place) as ledger:
            faults += ledger.damage().sentences
            states = {row.status for row in ledger.generations()}
            if not states <= {"published", "abandoned"}:
                faults.append(f"generations are {states}")
        if left := [path.name for path in place.glob(".*")]:
            faults.append(f"left behind: {left}")
    result = {
        "what": "publications under load, publishers killed, clocks that jump",
        "machine": machine(),
        "seed": arguments.seed,
        "seconds": arguments.seconds,
        "publishers": arguments.publishers,
        "readers": cores + 2,
        "published": published,
        "killed": killed,
        "clock_jumps": jumps if library else "there is no C compiler",
        "reads": reads,
        "last_generation": final.generation,
        "faults": faults,
    }
    write(arguments.out / "publish.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
