"""Two GPUs of a host as two ranks: an all-reduce behind each row-parallel GEMM, checked on both.

    python benchmarks/collective.py --out FOLDER [--devices cuda:0,cuda:1] [--shape N,K]
        [--backend NAME ...] [--max-m 512]

Every tactic of each backend at the edges of its buckets: all-reduces behind the GEMMs and beside
them on a second stream, eagerly and replayed as a graph. `--devices cpu,cpu` is the twin that any
machine runs, over gloo. Exit 1 where a sum was wrong or a rank ended.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _machine import machine

from fp4tune.autotune.verdict.buckets import ranges
from fp4tune.probes.backends import build_kernels, tactics
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.regimes.host.collective import run_ranks
from fp4tune.probes.regimes.host.own_process import Question
from fp4tune.probes.registry import load_one

BACKENDS = ("torch-dequant", "triton-w4a16", "marlin", "humming")
WIDTHS = {"humming": 8}
"""What an accumulator keeps, where that is less than 24 bits."""


def device_of(name: str) -> Device:
    if name == "cpu":
        return Device("cpu")
    major, minor = torch.cuda.get_device_capability(name)
    return Device("cuda", 10 * major + minor)


def tried(spec: str, problem: Problem, devices: Sequence[str]) -> dict[str, Any]:
    """What came of one backend."""
    backend, device = load_one(spec), device_of(devices[0])
    if why := backend.unsupported(problem, device):
        return {"backend": spec, "unsupported": why}
    pairs = []
    for m in ranges(problem.m):
        at = problem.at(m.hi)
        for tactic in tactics(backend, at, device) if m.hi else ():
            pairs += [(edge, tactic) for edge in dict.fromkeys((m.lo, m.hi))]
    build_kernels(backend, [problem.at(m.hi) for m in ranges(problem.m)], device, 4)
    question = Question(
        "", spec, problem.at(problem.m + 64), WIDTHS.get(spec, 24), 7,
        tuple(m for m, _ in pairs), tuple(tactic for _, tactic in pairs), devices[0],
    )  # fmt: skip
    start = time.perf_counter()
    found = run_ranks(question, devices, lambda: None, 300.0)
    return {"backend": spec, **found, "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", default="cuda:0,cuda:1")
    parser.add_argument("--shape", default="4096,4096")
    parser.add_argument("--max-m", type=int, default=512)
    parser.add_argument("--backend", action="append")
    chosen = parser.parse_args()
    n, k = map(int, chosen.shape.split(","))
    problem = Problem("nvfp4", chosen.max_m, n, k, "bf16", "bf16")
    devices = chosen.devices.split(",")
    # Multicast is the machine's, not this program's: it may be in use, or not there.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    rows = []
    for spec in chosen.backend or BACKENDS:
        row = tried(spec, problem, devices)
        rows.append(row)
        print(json.dumps(row), flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "devices": devices, "shape": [n, k], "rows": rows}
    (chosen.out / "collective.json").write_text(json.dumps(document, indent=1) + "\n")
    return int(any(row.get("bad") or row.get("error") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
