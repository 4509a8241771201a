"""What the witness costs: chains of GEMMs in CUDA graphs, with it over without it.

Chains of llama-3.1-8b's four GEMMs (layers with weights of their own, as many as are larger than
the L2 cache; the graph goes through them as often as the model has layers) at each m, by each
backend that runs here. Behind each GEMM: nothing; an empty kernel; the check, at every call and at
every launch; the same with one launch of eight looked at; and the default, a few calls a graph.
Replays of all variants are interleaved; medians of rounds, and the ratio to the bare chain.

First the kernel alone, for each shape and several ways to cut it into programs.

    python benchmarks/witness_cost.py --out DIR [--seconds 240]

Partial results are in DIR/witness_cost.json after every step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _machine import machine

from fp4tune.machine import devices
from fp4tune.probes import registry
from fp4tune.probes.backends import build_kernels, tactics
from fp4tune.probes.formats import quantise
from fp4tune.probes.problem import NVFP4, Fp4Tensor, Problem
from fp4tune.witness import _kernels, launch, limits, rows, vectors

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""qkv, o, gate and up, down."""
MS = (1, 16, 128, 2048)
BACKENDS = ("triton-w4a16", "marlin", "humming", "cublas")
LAYERS, MODEL = 4, 32
"""Layers with weights of their own (0.5 GB), and layers of the model."""
ROUNDS = 25
CUTS = ((1, 4), (1, 8), (2, 8), (4, 8), (8, 4), (8, 8))
"""(rows of a program, warps)."""


@dataclass(frozen=True, slots=True)
class Gemm:
    """One GEMM of a chain: what runs it, and the call that is checked behind it."""

    run: Callable[[], None]
    call: rows.WatchedCall
    sums: vectors.Sums
    limit: limits.Limit


def weight(n: int, k: int, seed: int) -> Fp4Tensor:
    g = torch.Generator(device="cuda").manual_seed(seed)
    return quantise(torch.randn(n, k, generator=g, device="cuda") * 0.05, NVFP4)


def prepared(name: str, w: Fp4Tensor, target: Any) -> tuple[Any, Any]:
    """(backend, its state of the weight); cuBLAS on the dequantised weight has no backend."""
    n, k = w.shape
    if name == "cublas":
        from fp4tune.probes.formats import dequantise

        return None, dequantise(w, torch.bfloat16).T
    backend = registry.load_one(name)
    why = backend.unsupported(Problem("nvfp4", 1, n, k), target.device)
    if why:
        raise RuntimeError(why)
    build_kernels(backend, [Problem("nvfp4", m, n, k) for m in MS], target.device, 8)
    return backend, backend.prepare(w, Problem("nvfp4", 1, n, k))


def gemm(made: tuple[Any, Any], w: Fp4Tensor, sums: vectors.Sums, m: int, target: Any) -> Gemm:
    n, k = w.shape
    a = torch.randn(m, k, device="cuda").bfloat16()
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    backend, state = made
    if backend is None:

        def run() -> None:
            torch.mm(a, state, out=out)
    else:
        problem = Problem("nvfp4", m, n, k)
        tactic = tactics(backend, problem, target.device)[0]

        def run() -> None:
            backend.run(state, a, out, tactic)

    call = rows.WatchedCall(a, out, torch.ones(1, device="cuda"))
    return Gemm(run, call, sums, limits.limit("bf16", sums.groups.width, k))


def captured(once: Callable[[], None]) -> torch.cuda.CUDAGraph:
    once()
    once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def timed(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each replay, variants in turn."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end))
    return found


def chain(
    gemms: list[Gemm], bench: launch.Bench, behind: Callable[[int, Gemm], None]
) -> torch.cuda.CUDAGraph:
    def once() -> None:
        for index in range(MODEL * len(SHAPES)):
            one = gemms[index % len(gemms)]
            one.run()
            behind(index, one)

    return captured(once)


def variants(bench: launch.Bench) -> dict[str, Callable[[int, Gemm], None]]:
    def checked(index: int, one: Gemm, period: int) -> None:
        place = launch.CallSite(index, index, period)
        launch.launch(one.call, one.sums, one.limit, bench, place)

    def empty(index: int, one: Gemm) -> None:
        _kernels.nothing[(1,)](bench.counters[index])

    return {
        "bare": lambda index, one: None,
        "empty": empty,
        "every": lambda index, one: checked(index, one, 1),
        "every, 1 of 8": lambda index, one: checked(index, one, 8),
        "default": lambda index, one: checked(index, one, 4) if index % 32 == 1 else None,
    }


def alone(report: dict[str, Any], save: Callable[[], None], until: float) -> None:
    """Microseconds of the check by itself, hot: 64 in a graph."""
    found = report.setdefault("alone", [])
    bench = launch.bench(torch.device("cuda"), 8, 64, launch.evidence_bytes(14336, 1024))
    for n, k in SHAPES:
        w = weight(n, k, 1)
        sums = vectors.sums_of([w], vectors.draw_signs(n))
        limit = limits.limit("bf16", sums.groups.width, k)
        for m in MS:
            if time.monotonic() > until:
                return
            a = torch.randn(m, k, device="cuda").bfloat16()
            y = (a.float() @ dequantised(w).T).bfloat16()
            call = rows.WatchedCall(a, y, torch.ones(1, device="cuda"))
            graphs = {}
            for of_rows, warps in CUTS:
                if m == 1 and of_rows > 1:
                    continue
                base = launch.cut(m, sums.groups.count, sums.groups.width, k)
                block_k = min(1 << (k - 1).bit_length(), 4096 // of_rows)
                shape = launch.Cut(of_rows, base.block_n, block_k, warps)

                def once(call=call, sums=sums, limit=limit, shape=shape) -> None:
                    for _ in range(64):
                        launch.launch(call, sums, limit, bench, launch.CallSite(0), shape)

                graphs[f"{of_rows} rows, {warps} warps"] = captured(once)
            times = {
                name: round(statistics.median(each) / 64 * 1000, 2)
                for name, each in timed(graphs, 5).items()
            }
            own = launch.cut(m, sums.groups.count, sums.groups.width, k)
            default = f"{own.rows} rows, {own.warps} warps"
            found.append({"n": n, "k": k, "m": m, "us": times, "own": default})
            save()
    counters = bench.counters.sum(0).tolist()
    report["alone counters"] = dict(zip(launch.COUNTERS, counters, strict=False))


def dequantised(w: Fp4Tensor) -> torch.Tensor:
    from fp4tune.probes.formats import dequantise

    return dequantise(w)


def chains(
    report: dict[str, Any], save: Callable[[], None], until: float, names: list[str]
) -> None:
    target = devices.gpus()[0][0]
    weights = [[weight(n, k, 10 * layer + n) for n, k in SHAPES] for layer in range(LAYERS)]
    sums = [
        [vectors.sums_of([w], vectors.draw_signs(w.shape[0])) for w in each] for each in weights
    ]
    found = report.setdefault("chains", [])
    for name in names:
        try:
            made = [[prepared(name, w, target) for w in each] for each in weights]
        except Exception as error:
            found.append({"backend": name, "error": f"{type(error).__name__}: {error}"[:300]})
            save()
            continue
        for m in MS:
            if time.monotonic() > until:
                return
            bench = launch.bench(torch.device("cuda"), 256, 64, launch.evidence_bytes(14336, 1024))
            try:
                gemms = [
                    gemm(made[layer][at], weights[layer][at], sums[layer][at], m, target)
                    for layer in range(LAYERS)
                    for at in range(len(SHAPES))
                ]
                graphs = {
                    kind: chain(gemms, bench, behind) for kind, behind in variants(bench).items()
                }
                times = timed(graphs, ROUNDS)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"[:300]
                found.append({"backend": name, "m": m, "error": said})
                save()
                continue
            bare = statistics.median(times["bare"])
            ratios = {
                kind: round(
                    statistics.median(x / y for x, y in zip(each, times["bare"], strict=True)), 4
                )
                for kind, each in times.items()
            }
            counted = dict(zip(launch.COUNTERS, bench.counters.sum(0).tolist(), strict=False))
            found.append(
                {
                    "backend": name,
                    "m": m,
                    "gemm_us": round(bare * 1000 / (MODEL * len(SHAPES)), 2),
                    "over bare": ratios,
                    "spread": {
                        kind: [round(min(each), 4), round(max(each), 4)]
                        for kind, each in times.items()
                    },
                    "counted": counted,
                }
            )
            save()
            del graphs, gemms
            torch.cuda.empty_cache()
        del made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--backend", action="append")
    parser.add_argument("--only", choices=("alone", "chains"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "rounds": ROUNDS}

    def save() -> None:
        report["seconds"] = round(time.monotonic() - start, 1)
        text = json.dumps(report, indent=1) + "\n"
        (options.out / "witness_cost.json").write_text(text)

    if options.only != "chains":
        alone(report, save, start + options.seconds / 3)
    if options.only != "alone":
        chains(report, save, start + options.seconds, options.backend or list(BACKENDS))
    save()
    for row in report.get("chains", ()):
        print(json.dumps({key: row[key] for key in row if key not in ("spread", "counted")}))


if __name__ == "__main__":
    main()
