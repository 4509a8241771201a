"""No false alarm: right kernels over random problems in every regime, and what was found.

Known-good kernels of the zoo, and real ones, each in a worker as in ``fp4tune probe``: graded, then
turn after turn with weights, rows and m of its own, half of the time as replays of one graph (that
is where the launches are), half in the other regimes. A finding is printed and kept; one in a
regime whose condition is known of that backend (--known) is counted apart.

    python benchmarks/soak_good.py --out DIR --seconds 150
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _machine import machine

from fp4tune.autotune.runner import Patience, Runner
from fp4tune.machine import devices
from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes import CERTAIN, CHANCE, REGIMES
from fp4tune.probes.worker.supervisor import WorkerFailed

BACKENDS = (
    "zoo-own-buffer",
    "zoo-random-order",
    "zoo-bf16-alpha",
    "zoo-weights-before-wait",
    "torch-dequant",
    "torch-bf16-resident",
    "triton-w4a16",
    "marlin",
    "humming",
)
SHAPES = ((1024, 1024), (4096, 4096), (2048, 8192))
KNOWN = tuple(
    f"{name}:{regime}"
    for name in ("humming", "marlin")
    for regime in ("streams", "threads", "graph-streams")
)
"""Conditions already known: a prepared layer of theirs is for one stream at a time."""
LEFT_OUT = ("huge", "neighbours")
ROWS = 257 + 64
SMALL, LARGE = (1, 64), (65, 257)
MEMORY = 8 << 30
AIM = 1_000_000


def items(rng: random.Random, tactics: list[str], widths: list[int]) -> list[dict[str, Any]]:
    """Six small m and one larger, at the widths of their ranges."""
    small = sorted(rng.sample(range(SMALL[0], SMALL[1] + 1), 6))
    return [
        {"ms": small, "tactic": tactics[0], "width": widths[0]},
        {"ms": [rng.randint(*LARGE)], "tactic": tactics[1], "width": widths[1]},
    ]


class Soak:
    """One backend on one shape."""

    def __init__(self, name: str, n: int, k: int, target: devices.Target) -> None:
        self.name = name
        self.problem = Problem("nvfp4", ROWS, n, k)
        self.runner = Runner(name, target, Patience(60.0), None, lambda *_: None)
        self.launches: dict[str, int] = defaultdict(int)
        self.problems: dict[str, int] = defaultdict(int)
        self.statuses: dict[str, str] = {}
        self.findings: list[dict[str, Any]] = []
        self.seconds = 0.0

    def open(self, seed: int) -> list[str]:
        """Start, compile and open; the tactics of the two ranges."""
        self.runner.start()
        edges = [self.problem.at(SMALL[1]), self.problem.at(LARGE[1])]
        self.runner.build(edges, 8)
        self.runner.open(self.problem, seed, MEMORY)
        return [tactics[0] for tactics in self.runner.tactics(edges)]

    def run(self, seed: int, seconds: float, tactics: list[str]) -> None:
        rng = random.Random(seed)
        start = time.monotonic()
        first = items(rng, tactics, [24, 24])
        try:
            graded = self.runner.ask("grade", items=first)
        except WorkerFailed as failure:
            self._found("grade", {"kind": failure.kind, "message": str(failure)})
            return
        for result in graded:
            self._keep("grade", result)
        widths = [result["width"] for result in graded]
        if None in widths:
            return
        others = [n for n in REGIMES if n != "graph" and n not in LEFT_OUT]
        others = [n for n in others if f"{self.name}:{n}" not in KNOWN]
        turn = 0
        while time.monotonic() - start < seconds:
            turn += 1
            part = max(0.3, seconds / 5)
            self._turn("graph", items(rng, tactics, widths), part)
            rng.shuffle(others)
            for name in others:
                if time.monotonic() - start > seconds * (turn + 1) / 4 and turn > 1:
                    break
                if self.statuses.get(name) != "not applicable":
                    self._turn(name, items(rng, tactics, widths), 0.05)
        self.seconds = round(time.monotonic() - start, 2)

    def _turn(self, name: str, chosen: list[dict[str, Any]], seconds: float) -> None:
        budget = {"least": 4, "most": 1_000_000, "seconds": seconds, "long": True}
        aim = {"launches": 1_000_000, "problems": 10_000, "seconds": seconds / len(chosen)}
        length = {"aim": aim} if name in CHANCE | CERTAIN else {}
        try:
            result = self.runner.ask("regime", name=name, items=chosen, budget=budget, **length)
        except WorkerFailed as failure:
            if failure.kind == "not applicable":
                self.statuses[name] = failure.kind
            else:
                self._found(name, {"kind": failure.kind, "message": str(failure)})
            return
        if result["not_exercised"]:
            self.statuses[name] = f"not exercised: {result['not_exercised']}"
        for part in result["items"]:
            if part.get("exempt"):
                self.statuses[name] = f"exempt: {part['exempt']}"
            self._keep(name, part)

    def _keep(self, name: str, part: dict[str, Any]) -> None:
        self.launches[name] += part.get("launches", 0)
        self.problems[name] += part.get("problems", 0)
        for bad in part.get("bad", []):
            self._found(name, {k: v for k, v in bad.items() if k not in ("map", "tiles")})
        if "error" in part:
            self._found(name, part["error"])
        if part.get("changed_inputs"):
            self._found(name, {"kind": "input modified"})

    def _found(self, name: str, what: dict[str, Any]) -> None:
        self.findings.append({"regime": name, **what})
        print(f"  FINDING {self.name} {name}: {json.dumps(what, default=str)[:300]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150.0, help="of checked launches")
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--gpu", default=None)
    arguments = parser.parse_args()
    (target,) = devices.select(arguments.gpu)
    names = arguments.backend or list(BACKENDS)
    pairs = [(name, n, k) for n, k in SHAPES for name in names]
    share = arguments.seconds / len(pairs)
    about = machine()
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    with ThreadPoolExecutor(max_workers=2) as pool:
        opened: dict[int, tuple[Soak, Future[list[str]]]] = {}
        for index, _ in enumerate(pairs):
            for soon in range(index, min(index + 2, len(pairs))):
                if soon not in opened:
                    soak = Soak(*pairs[soon], target)
                    opened[soon] = (soak, pool.submit(soak.open, arguments.seed + soon))
            soak, future = opened.pop(index)
            row: dict[str, Any] = {"backend": soak.name, "n": soak.problem.n, "k": soak.problem.k}
            try:
                soak.run(arguments.seed + index, share, future.result())
            except Exception as error:  # one that cannot be built here is told, and not counted
                row["not_run"] = f"{type(error).__name__}: {str(error)[:300]}"
            finally:
                soak.runner.close()
            row.update(
                launches=dict(soak.launches),
                problems=dict(soak.problems),
                statuses=soak.statuses,
                findings=soak.findings,
                seconds=soak.seconds,
            )
            rows.append(row)
            total = sum(sum(r["launches"].values()) for r in rows)
            document = {
                "about": about,
                "device": target.name,
                "seed": arguments.seed,
                "rows_of_pools": ROWS,
                "known": KNOWN,
                "left_out": LEFT_OUT,
                "launches": total,
                "findings": sum(len(r["findings"]) for r in rows),
                "seconds": round(time.monotonic() - start, 1),
                "rows": rows,
            }
            arguments.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(document, indent=1, default=str) + "\n"
            (arguments.out / "soak-good.json").write_text(text)
            count = sum(soak.launches.values())
            print(
                f"{time.monotonic() - start:6.0f} s  {soak.name} n={soak.problem.n} "
                f"k={soak.problem.k}: {count} launches, {len(soak.findings)} findings "
                f"{row.get('not_run', '')}",
                flush=True,
            )
    print(f"{total} checked launches, {document['findings']} findings, {document['seconds']} s")
    return 0 if total >= AIM and not document["findings"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
