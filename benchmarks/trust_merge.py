"""Merges of thousands of bundles killed, and run twice at once: is the store what it should be?

A store is made in one go, for comparison. Another is made of the same bundles by merges that are
killed (``kill -9``, the first process alone, so that its workers have to end by themselves), then
by two merges at once, then once more. Each time: whoever reads it gets a whole store, with bundles
that were given and no other; no process goes on writing. At the end both stores say the same.

    python benchmarks/trust_merge.py --out benchmarks/results/trust [--bundles 10000 --kills 20]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from _machine import machine, processes, write
from _node import fp4tune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import fleets

from fp4tune.errors import Refused
from fp4tune.fleet import shard
from fp4tune.fleet.places import Place

MARK = "TRUST_MERGE_MARK"


def start(source: Path, store: Path) -> tuple[subprocess.Popen[str], str]:
    mark = secrets.token_hex(8)
    command = fp4tune("fleet", "merge", source, "--into", store, "--json")
    environ = {**os.environ, MARK: mark}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environ, **pipes), mark


def ended(running: Sequence[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What these merges said, once they are done."""
    said = []
    for merge in running:
        out, error = merge.communicate(timeout=1800)
        if merge.returncode:
            raise RuntimeError(f"a merge ended with code {merge.returncode}: {error[-500:]}")
        said.append(json.loads(out))
    return said


def index(store: Path) -> list[str]:
    """The bundles of a store, each as often as it is listed."""
    return [str(identity) for identity in shard.indexed(Place(str(store)))["bundle"]]


def report(store: Path) -> Any:
    """All that a store says of its fleet."""
    command = fp4tune("fleet", "report", store, "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr[-500:])
    found = json.loads(done.stdout)
    return {k: v for k, v in found.items() if k not in ("store", "created", "at", "seconds")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bundles", type=int, default=450)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    began = time.monotonic()
    faults: list[str] = []
    kills = []
    with tempfile.TemporaryDirectory(prefix="fp4tune-trust-") as folder:
        source, whole, store = (Path(folder, name) for name in ("in", "whole", "store"))
        for number in range(arguments.bundles):
            fleets.put(source, number, gpus=1, failures={(0, "fast"): 3} if number % 7 == 0 else {})
        made = time.monotonic() - began
        before = time.monotonic()
        (said,) = ended([start(source, whole)[0]])
        seconds = time.monotonic() - before
        given = set(index(whole))
        if len(given) != arguments.bundles or said["refused"]:
            faults.append(f"{len(given)} of {arguments.bundles} bundles are in the first store")
        print(f"{arguments.bundles} bundles merged in {seconds:.1f} s", flush=True)
        have: set[str] = set()
        for _ in range(arguments.kills):
            if have == given:  # there is nothing left to be killed in: it is begun again
                shutil.rmtree(store)
                have = set()
            left_over = 1 - len(have) / arguments.bundles
            merge, mark = start(source, store)
            moment = time.monotonic() + rng.uniform(0.1, 0.8) * seconds * left_over
            while merge.poll() is None and time.monotonic() < moment:
                time.sleep(0.005)
            merge.kill()
            merge.communicate()
            killed = time.monotonic()
            while left := list(processes(**{MARK: mark})):
                if time.monotonic() - killed > 10:
                    faults.append(f"{len(left)} processes live on")
                    break
                time.sleep(0.01)
            with suppress(Refused, FileNotFoundError):
                now = index(store)
                if set(now) - given or len(set(now)) != len(now):
                    faults.append("there are bundles that were not given, or are there twice")
                if have - set(now):
                    faults.append(f"{len(have - set(now))} bundles are gone")
                have = set(now)
            kills.append({"in_the_store": len(have), "died_in": round(killed - moment, 3)})
            print(json.dumps(kills[-1]), flush=True)
        ended([start(source, store)[0] for _ in range(2)])
        ended([start(source, store)[0]])
        if set(index(store)) != given:
            faults.append(f"{len(set(index(store)) ^ given)} bundles are not as in the other store")
        twice = len(index(store)) - len(set(index(store)))
        if report(store) != report(whole):
            faults.append("the two stores do not say the same")
        fresh = Path(folder, "fresh")
        ended([start(source, fresh)[0] for _ in range(2)])
        if set(index(fresh)) != given or report(fresh) != report(whole):
            faults.append("a store that two merges made at once does not say the same")
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        shutil.rmtree(fresh)
    result = {
        "what": "merges killed and run twice at once",
        "machine": machine(),
        "seed": arguments.seed,
        "bundles": arguments.bundles,
        "kills": kills,
        "seconds_to_make_bundles": round(made, 1),
        "seconds_of_a_merge": round(seconds, 1),
        "listed_twice": twice,
        "store_bytes": size,
        "faults": faults,
        "seconds": round(time.monotonic() - began, 1),
    }
    write(arguments.out / "merge.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
