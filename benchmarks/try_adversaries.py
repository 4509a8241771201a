"""Run the PDL adversaries of this GPU on kernels known to be right and known to be wrong.

Every mutant is one Triton GEMM, launched with PDL, that waits for the kernel before it at the right
or at a wrong place. For each mutant, problem and adversary the table says in how many rounds of the
chain the output was wrong (over all its launches together: the most of any launch), by how many
launches in all, and what the graph's edges said of its kernels; the controls of every run are
printed where they did not do what they should.

    python benchmarks/try_adversaries.py [--out result.json] [--rounds 10] [--big]
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from fp4tune.probes.backends import tactics
from fp4tune.probes.data import exact
from fp4tune.probes.launch.case import Launch, case
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.regimes.pdl import edges
from fp4tune.probes.regimes.pdl.pdl import attack
from fp4tune.probes.registry import load_one
from fp4tune.probes.zoo.pdl import PdlGemm

KINDS = ("raw", "war", "waw")
MS = (1, 16, 64, 257)

# What each adversary must catch: the letters of KINDS, in order, where it must.
GEMMS: tuple[tuple[PdlGemm, tuple[str, ...]], ...] = (
    (PdlGemm("good-wait-first", "first"), ()),
    (PdlGemm("good-weights-before-wait", "weights"), ()),
    (PdlGemm("good-no-pdl", "never", pdl=False), ()),
    (PdlGemm("good-fp4", "first", "fp4"), ()),
    (PdlGemm("bad-never", "never"), ("raw", "war", "waw")),
    (PdlGemm("bad-some-blocks", "some"), ("raw", "war", "waw")),
    (PdlGemm("bad-wait-last", "last"), ("raw", "war", "waw")),
    (PdlGemm("bad-zeroed-before-wait", "zeroed"), ("war",)),
    (PdlGemm("bad-own-zeroed-output", "never", own_output=True), ("raw",)),
    (PdlGemm("bad-zeroing-kernel", "never", zeroing=True), ("raw", "war", "waw")),
    (PdlGemm("bad-fp4-never", "never", "fp4"), ("raw", "war", "waw")),
    (PdlGemm("bad-fp4-scales-before-wait", "scales", "fp4"), ("raw",)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--big", action="store_true", help="also n = k = 4096, m up to 2048")
    parser.add_argument("--backend", action="append", help="further backends that must pass")
    arguments = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    device = Device("cuda", 10 * major + minor)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    subjects: list[tuple[Any, tuple[str, ...]]] = list(GEMMS)
    for name in arguments.backend or ["triton-w4a16", "torch-dequant"]:
        subjects.append((load_one(name), ()))
    shapes = [(1024, 1024, MS)]
    if arguments.big:
        shapes.append((4096, 4096, (1, 16, 500, 2048)))
    results, unexpected = [], 0
    for backend, must in subjects:
        for n, k, ms in shapes:
            for kind in KINDS:
                row = one(backend, device, kind, n, k, ms, arguments.rounds)
                caught = row.get("caught", 0) > 0
                ok = "error" not in row and row["missed"] is None and caught == (kind in must)
                if not ok and kind not in must and row.get("calls", {}).get("pdl") and must:
                    ok = "error" not in row  # a mutant caught by more than it has to be
                unexpected += not ok
                results.append({**row, "as_expected": ok})
                show(results[-1])
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print("unexpected:", unexpected)
    return 1 if unexpected else 0


def one(
    backend: Any, device: Device, kind: str, n: int, k: int, ms: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """One backend against one adversary; a traceback is printed and goes on."""
    row: dict[str, Any] = {"backend": backend.name, "n": n, "k": k, "adversary": kind}
    start = time.perf_counter()
    try:
        problem = Problem("nvfp4", max(ms), n, k, backend.activation)
        chosen = case(backend, problem, exact(problem, 24, 7, device.torch))
        launches = [
            Launch(0, 0, m, tactics(backend, problem.at(m), device)[0], i) for i, m in enumerate(ms)
        ]
        outcome = attack(kind, backend, [chosen], launches, Budget(rounds, rounds, 0.0))
    except Exception as error:
        traceback.print_exc()
        return {**row, "error": f"{type(error).__name__}: {error}"}
    reports = [report for _, report in outcome.reports]
    worst = max((report.bad_launches for report in reports), default=0)
    proof = outcome.proof
    return {
        **row,
        "caught": worst,
        "rounds": outcome.repeats,
        "bad_launches": [report.bad_launches for report in reports],
        "first": describe(reports),
        "missed": outcome.not_exercised,
        "exempt": len(outcome.exempt),
        "calls": proof["calls"],
        "proof": proof,
        "seconds": round(time.perf_counter() - start, 2),
    }


def describe(reports: list[Any]) -> str:
    for report in reports:
        if not report.clean:
            return (
                f"wrong {report.wrong} unwritten {report.unwritten} nan {report.not_finite} "
                f"early {report.early} guard {report.guard}"
            )
    return ""


def show(row: dict[str, Any]) -> None:
    title = f"{row['backend']:28s} {row['n']:5d} {row['adversary']}"
    if "error" in row:
        print(f"{title} ERROR {row['error'][:200]}", flush=True)
        return
    modes = {name: row["proof"][name] for name in ("eager", "graph") if name in row["proof"]}
    controls = ", ".join(
        f"{name} bad {m['bad_control_flagged']}/{m['rounds']} good {m['good_control_flagged']} "
        f"early {m['started_early']}"
        for name, m in modes.items()
        if isinstance(m, dict)
    )
    mark = "ok" if row["as_expected"] else "??"
    graph = row["proof"].get("graph")
    notes = [
        row["first"],
        controls,
        row["missed"],
        graph if isinstance(graph, str) else None,
        row["proof"].get("later_kernels_with_pdl"),
    ]
    print(
        f"{mark} {title} caught {row['caught']}/{row['rounds']} {row['bad_launches']} "
        f"calls {row['calls']} exempt {row['exempt']} {row['seconds']} s",
        *(str(note) for note in notes if note),
        sep=" | ",
        flush=True,
    )


if __name__ == "__main__":
    try:
        edges.tail(0)
    except edges.CannotSee as reason:
        print("edges:", reason)  # "not being captured" is the answer of a driver that can tell
    raise SystemExit(main())
