"""No false alarm: rows of right kernels under the witness, over backends, data and dtypes.

Each backend (Marlin, humming, Triton, quack where it is a plugin, cuBLAS on the dequantised weight)
multiplies weights and activations of every data family, bf16 and fp16; activations are drawn anew
before every launch, from a pool of rows with signs of their own. Each launch is watched, signs are
drawn anew now and then, and suspicions are judged as in production. What is truly wrong is no alarm
that is false: where a float64 reference finds a backend's answers wrong on a family (Marlin drops
subnormal scales), two launches are watched, and counted apart.

    python benchmarks/witness_alarms.py --out DIR [--seconds 300] [--rows 1e8] [--first 0]

Partial results are in DIR/witness_alarms.json every few seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from _machine import machine, write

from fp4tune.machine.device import Device
from fp4tune.probes import registry
from fp4tune.probes.backends import build_kernels, tactics
from fp4tune.probes.check.reference import expect, right
from fp4tune.probes.check.tiles import tile_error, tile_limit
from fp4tune.probes.data.families import draw, families
from fp4tune.probes.formats import DTYPES, dequantise
from fp4tune.probes.problem import Problem
from fp4tune.witness.calls import Unreadable
from fp4tune.witness.rows import WatchedCall
from fp4tune.witness.sources import HostCopy
from fp4tune.witness.watcher import WatchSubject, Witness, WitnessOptions

BACKENDS = ("cublas", "triton-w4a16", "marlin", "humming", "quack")
SHAPES = ((4096, 4096), (1024, 1024), (2048, 8192))
ROWS = 4096
"""Rows of a launch."""
EACH, EACH_WRONG = 64, 2
"""Launches of one family before the next, by one that is right there, and by one that is not."""
SHORT = ("humming",)
"""Backends whose accumulator is known to be short: judged by tiles."""


class NotThis(Exception):
    """This backend does not take such a problem; the message says why."""


class Right:
    """One backend on one family's weight, watched."""

    def __init__(self, name: str, problem: Problem, family: str, seed: int, device: str) -> None:
        kind = Device(device, _sm() if device == "cuda" else None)
        operands = draw(problem, family, seed, device)
        self.pool = operands.a
        self.name, self.problem, self.device = name, problem, device
        if name == "cublas":
            w = dequantise(operands.weight, torch.float32)
            self.run = lambda a, out: torch.mul(
                torch.mm(a.float(), w.T), 1.0, out=out
            )  # in float32: a right one, whatever the scales
        else:
            backend = registry.load_one(name)
            why = backend.unsupported(problem, kind)
            if why:
                raise NotThis(why)
            build_kernels(backend, [problem], kind, 8)
            state = backend.prepare(operands.weight, problem)
            tactic = tactics(backend, problem, kind)[0]
            self.run = lambda a, out: backend.run(state, a, out, tactic)
        self.judged: list[Any] = []
        self.witness = Witness(
            WitnessOptions("every", redraw=0), lambda *found: self.judged.append(found)
        )
        width = None if name in SHORT or name == "marlin" else 24
        subject = WatchSubject(family, name, problem, "default", width)
        copy = HostCopy((operands.weight.to("cpu"),))
        self.watched = self.witness.add(subject, [operands.weight], copy)
        self.out = torch.empty(problem.m, problem.n, dtype=problem.dtype, device=device)
        self.wrong = self._wrong(operands, width)

    def _wrong(self, operands: Any, width: int | None) -> int:
        """Elements (of a short accumulator, tiles) of one launch that a probe would call wrong."""
        self.run(self.pool, self.out)
        expected = expect(operands, self.problem, roundings=2)
        ref = expected.lo.float() if expected.ref is None else expected.ref
        rows = ref.isfinite().all(dim=1)
        if width == 24:
            return int((~right(self.out, expected))[rows].sum())
        error = tile_error(self.out[rows], ref[rows])
        return int((~(error <= tile_limit(self.problem.k))).sum())

    def launch(self, turn: int) -> None:
        """Other activations of the same family: rows turned, and signs drawn for each k."""
        g = torch.Generator(device=self.device).manual_seed(turn)
        k = self.problem.k
        signs = torch.randint(0, 2, (k,), generator=g, device=self.device) * 2 - 1
        a = self.pool.roll((turn * 37) % self.problem.m, 0) * signs.to(self.pool.dtype)
        self.run(a, self.out)
        self.witness.see(self.watched, WatchedCall(a, self.out))


def _sm() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rows", type=float, default=1e8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", action="append")
    parser.add_argument("--first", type=int, default=0, help="number of the first turn: other data")
    options = parser.parse_args()
    torch.set_num_threads(min(4, torch.get_num_threads()))
    start = time.monotonic()
    gpu = options.device == "cuda"
    report: dict[str, Any] = {"machine": machine(), "device": options.device, "found": {}}
    total: Counter[str] = Counter()

    def save() -> None:
        report["seconds"] = round(time.monotonic() - start, 1)
        report["total"] = dict(total)
        write(options.out / "witness_alarms.json", json.dumps(report, indent=1) + "\n")

    dead: dict[str, str] = {}
    turn = options.first
    while total["rows"] < options.rows and time.monotonic() - start < options.seconds:
        n, k = SHAPES[turn % len(SHAPES)] if gpu else (256, 256)
        for dtype in DTYPES:
            problem = Problem("nvfp4", ROWS if gpu else 64, n, k, "bf16", dtype)
            for family in families(problem):
                for name in options.backend or BACKENDS:
                    if name in dead or time.monotonic() - start > options.seconds:
                        continue
                    try:
                        served = Right(name, problem, family.name, turn, options.device)
                        each = (EACH if gpu else 3) if not served.wrong else EACH_WRONG
                        for index in range(each):
                            served.launch(EACH * turn + index)
                            if index == each // 2:
                                served.witness.redraw(served.watched)
                        served.witness.look()
                    except (NotThis, Unreadable) as error:
                        report["found"][f"{name} {family.name} {dtype}"] = {"left": str(error)}
                        continue
                    except Exception as error:
                        dead[name] = f"{type(error).__name__}: {error}"[:200]
                        report["dead"] = dead
                        continue
                    _count(report, total, served, family, dtype)
        turn += 1
        save()
        print(json.dumps(dict(total)), flush=True)
    save()
    bad = {key: row for key, row in report["found"].items() if row.get("suspicions")}
    print(json.dumps({"total": dict(total), "with suspicions": bad, "dead": dead}, indent=1))


def _count(
    report: dict[str, Any], total: Counter[str], served: Right, family: Any, dtype: str
) -> None:
    counts: Counter[str] = Counter()
    for each in served.witness.layers():
        counts.update(each.counts)
    known = served.wrong > 0
    key = f"{served.name} {family.name} {dtype}"
    row = report["found"].setdefault(key, {"wrong": 0})
    row["wrong"] += served.wrong
    for what in ("rows", "skipped", "beyond", "suspicions", "faults", "cleared"):
        row[what] = row.get(what, 0) + counts[what]
        total[("truly wrong: " if known else "") + what] += counts[what]
    if served.judged:
        _, record, judged = served.judged[0]
        row["first"] = {"gap": record.gap, "limit": record.limit, "row": record.row,
                        "status": judged.status, "why": judged.why}  # fmt: skip


if __name__ == "__main__":
    main()
