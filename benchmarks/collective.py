"""Two GPUs of a host as two ranks: an all-reduce behind each row-parallel GEMM, checked on both.

    python benchmarks/collective.py --out FOLDER [--gpus 0,1] [--shape N,K] [--backend NAME ...]
        [--max-m 512]

Every tactic of each backend at the edges of its buckets: all-reduces behind the GEMMs and beside
them on a second stream, eagerly and replayed as a graph. `--gpus none,none` is the twin that any
machine runs, over gloo. Exit 1 where a sum was wrong or a rank ended.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _machine import machine

from fp4tune.autotune.layer import SPARE_ROWS
from fp4tune.autotune.runner import Patience, Runner
from fp4tune.autotune.verdict.buckets import ranges
from fp4tune.machine import devices
from fp4tune.machine.devices import Target
from fp4tune.probes.backends import tactics
from fp4tune.probes.problem import Problem
from fp4tune.probes.registry import load_one
from fp4tune.probes.worker.supervisor import WorkerFailed

BACKENDS = ("torch-dequant", "triton-w4a16", "marlin", "humming")
WIDTHS = {"humming": 8}
"""What an accumulator keeps, where that is less than 24 bits."""


def tried(spec: str, problem: Problem, targets: tuple[Target, Target]) -> dict[str, Any]:
    """What came of one backend, on either rank."""
    backend, device = load_one(spec), targets[0].device
    if why := backend.unsupported(problem, device):
        return {"backend": spec, "unsupported": why}
    pairs = []
    for m in ranges(problem.m):
        at = problem.at(m.hi)
        for tactic in tactics(backend, at, device) if m.hi else ():
            pairs += [(edge, tactic) for edge in dict.fromkeys((m.lo, m.hi))]
    rows = problem.at(problem.m + SPARE_ROWS)
    asked = {
        "problem": asdict(rows), "width": WIDTHS.get(spec, 24), "seed": 7,
        "ms": [m for m, _ in pairs], "tactics": [tactic for _, tactic in pairs],
    }  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def one(rank: int) -> dict[str, Any]:
            patience = Patience(120.0)
            runner = Runner(spec, targets[rank], patience, None, lambda who, text: None)
            try:
                runner.build([problem.at(m.hi) for m in ranges(problem.m)], 4)
                return runner.ask("collective", **asked, rank=rank, meet=f"{folder}/meet")
            except WorkerFailed as failure:
                return {"error": {"kind": failure.kind, "message": str(failure)}}
            finally:
                runner.close()

        found = list(pool.map(one, range(2)))
    return {"backend": spec, "ranks": found, "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--shape", default="4096,4096")
    parser.add_argument("--max-m", type=int, default=512)
    parser.add_argument("--backend", action="append")
    chosen = parser.parse_args()
    n, k = map(int, chosen.shape.split(","))
    problem = Problem("nvfp4", chosen.max_m, n, k, "bf16", "bf16")
    one, two = (devices.select(name)[0] for name in chosen.gpus.split(","))
    # Multicast is the machine's, not this program's: it may be in use, or not there.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    rows = []
    for spec in chosen.backend or BACKENDS:
        row = tried(spec, problem, (one, two))
        rows.append(row)
        print(json.dumps(row), flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "gpus": chosen.gpus, "shape": [n, k], "rows": rows}
    (chosen.out / "collective.json").write_text(json.dumps(document, indent=1) + "\n")
    parts = [part for row in rows for part in row.get("ranks", ())]
    return int(any(part.get("bad") or part.get("error") for part in parts))


if __name__ == "__main__":
    raise SystemExit(main())
