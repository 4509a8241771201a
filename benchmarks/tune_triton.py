"""Search the configurations of `triton-w4a16` on this GPU: correct first, then fast.

    python benchmarks/tune_triton.py --out tune.json [--budget 150] [--shapes "4096x4096:1,16"]
        [--variants all|old|new|candidates]

Every configuration is first compared with an fp64 reference on exact data (any order of fp32 sums
gives the same bits), then timed in a CUDA graph over copies of the weight that together exceed
twice the L2, beside cuBLAS on a resident bf16 weight treated the same way. Microseconds.
`--variants` says what is searched beside the backend's own candidates: ``old`` reads activations
through pointers, ``new`` are the later ideas (the copy engine, taller weight tiles).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path

import torch

from fp4tune.probes.backends.triton_w4a16._tactics import (
    TileConfig,
    candidates,
    parse,
    shared_limit,
)
from fp4tune.probes.backends.triton_w4a16.gemm import TritonW4A16, compile_for, pack
from fp4tune.probes.problem import FORMATS, Device, Fp4Tensor, Problem

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SHAPES = {
    (4096, 4096): (1, 4, 16, 32, 64, 128, 192, 256, 500, 1024, 2048),
    (28672, 4096): (1, 16, 64, 128, 500, 2048),
    (4096, 14336): (1, 16, 64, 256, 2048),
    (6144, 4096): (1, 48, 128, 300, 2048),
    (1024, 8192): (1, 16, 128, 2048),
}


def draw(fmt: str, n: int, k: int, kind: str, device: torch.device, seed: int) -> Fp4Tensor:
    """A weight whose sums with small integers are exact in 24 bits; `kind` picks the scales."""
    g = torch.Generator(device=device).manual_seed(seed)
    form = FORMATS[fmt]
    low, high = {
        ("nvfp4", "middle"): (56, 64),
        ("nvfp4", "subnormal"): (0, 16),
        ("nvfp4", "maximal"): (120, 127),
        ("mxfp4", "middle"): (125, 129),
        ("mxfp4", "subnormal"): (0, 4),
        ("mxfp4", "maximal"): (228, 231),
    }[fmt, kind]

    def integers(a: int, b: int, *shape: int) -> torch.Tensor:
        return torch.randint(a, b, shape, dtype=torch.uint8, device=device, generator=g)

    codes, scales = integers(0, 256, n, k // 2), integers(low, high, n, k // form.block)
    scale = 0.25 if form.has_global else 1.0
    return Fp4Tensor(form, codes, scales, torch.tensor(scale, device=device))


def dense(weight: Fp4Tensor) -> torch.Tensor:
    """The weight's values in float64, without the global scale; scales decoded arithmetically."""
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).flatten(1).int()
    values = torch.tensor(E2M1, dtype=torch.float64, device=codes.device)[codes & 7]
    values = torch.where(codes >= 8, -values, values)
    bits = weight.scales.double()
    if weight.format.scale == "e8m0":
        scales = torch.exp2(bits - 127)
    else:
        exponent, mantissa = torch.floor(bits / 8), bits % 8
        normal = torch.exp2(exponent - 7) * (1 + mantissa / 8)
        scales = torch.where(exponent == 0, mantissa * 2.0**-9, normal)
    return values * scales.repeat_interleave(weight.format.block, 1)


def exact(a: torch.Tensor, weight: Fp4Tensor) -> torch.Tensor:
    return (a.double() @ dense(weight).T * weight.global_scale.double()).to(a.dtype)


def activations(m: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    g = torch.Generator(device=device).manual_seed(m + k)
    return torch.randint(-4, 5, (m, k), device=device, generator=g).to(dtype)


def old(problem: Problem, device: Device) -> list[TileConfig]:
    """Activations through pointers, every tile, split and depth worth a try for the problem's m."""
    m = problem.m
    if m <= 16:
        return tiles(problem, "gemm", (16,), (64, 128), (4,))
    if m <= 64:
        bms = (16, 32, 64) if m == 32 else (32, 64)
        return tiles(problem, "gemm", bms, (64, 128), (4,))
    if m <= 256:
        return tiles(problem, "gemm", (64, 128), (64, 128), (4, 8))
    return [
        *tiles(problem, "gemm", (64, 128, 256), (64, 128), (4, 8)),
        TileConfig("gemm", 128, 128, 1, 8, 4, 4),
        TileConfig("gemm", 256, 128, 1, 8, 3, 16),
    ]


def new(problem: Problem, device: Device) -> list[TileConfig]:
    """Activations by the copy engine; and tall weight tiles, which read fewer bytes from the L2."""
    if (device.sm or 0) < 90:
        return []
    m = problem.m
    if m <= 16:
        return [
            *tiles(problem, "tma", (16,), (64, 128), (4,), (3, 4, 6)),
            *small(problem, (8, 16) if m <= 8 else (16,)),
        ]
    if m <= 64:
        return tiles(problem, "tma", (32, 64) if m > 32 else (32,), (64, 128, 256), (4, 8))
    if m <= 256:
        return [
            *tiles(problem, "tma", (64, 128, 256), (64, 128, 256), (4, 8)),
            *tiles(problem, "gemm", (64, 128), (256,), (8,)),
        ]
    found = [
        *tiles(problem, "tma", (64, 128, 256), (64, 128, 256), (4, 8)),
        *tiles(problem, "gemm", (128,), (256,), (8,)),
    ]
    for group in (1, 2, 4, 16, 32):
        found += [
            TileConfig("tma", 256, 128, 1, 8, 3, group),
            TileConfig("tma", 128, 256, 1, 8, 4, group),
            TileConfig("tma", 128, 128, 1, 8, 4, group),
        ]
    return found


def small(problem: Problem, bms: tuple[int, ...]) -> list[TileConfig]:
    """What may bring more of a weight onto its way at once: several k-tiles a step, deep queues, a
    second warpgroup on the same activations."""
    found = []
    for bm, (bn, warps), deep in product(bms, ((64, 4), (128, 4), (128, 8), (256, 8)), (1, 2, 4)):
        for stages, split in product((2, 3, 4, 8), (1, 2, 4, 8)):
            each = TileConfig("gemm", bm, bn, split, warps, stages, deep=deep)
            blocks = -(-problem.n // bn) * split
            if 100 <= blocks <= 132 * 8 and problem.k // 128 // split >= 2 * deep:
                found.append(each)
    return found


def tiles(
    problem: Problem,
    kernel: str,
    bms: tuple[int, ...],
    bns: tuple[int, ...],
    warps: tuple[int, ...],
    stages: tuple[int, ...] = (),
) -> list[TileConfig]:
    """Every sensible combination of the sizes given, with split-K."""
    found = []
    for bm, bn, w in product(bms, bns, warps):
        blocks = -(-problem.m // bm) * -(-problem.n // bn)
        # 128 accumulators a thread at most; two warpgroups need two rows of 64
        if bm * bn > w * 32 * 128 or (w == 8 and (bn < 128 or bm * bn < 128 * 128)):
            continue
        for s in stages or ((2, 3, 4, 6) if bm < 128 else (2, 3, 4)):
            for split in (1, 2, 4, 8, 16):
                if split > 1 and not 100 <= blocks * split <= 132 * 8:
                    continue
                if problem.k // 128 // split >= 2:
                    found.append(TileConfig(kernel, bm, bn, split, w, s))
    return found


def grid(problem: Problem, device: Device, variants: str) -> list[TileConfig]:
    """The configurations to time for the problem."""
    found = list(candidates(problem, device))
    if variants in ("all", "old"):
        found += old(problem, device)
    if variants in ("all", "new"):
        found += new(problem, device)
    return [c for c in dict.fromkeys(found) if c.shared() <= shared_limit(device)]


def _resident(weights: list[torch.Tensor], a: torch.Tensor, outs: list[torch.Tensor], i: int):
    torch.mm(a, weights[i % len(weights)].T, out=outs[i % 4])


def _fused(backend: TritonW4A16, states: list, a: torch.Tensor, outs: list, tactic: str, i: int):
    backend.run(states[i % len(states)], a, outs[i % 4], tactic)


def timed(call: Callable[[int], None], calls: int, rounds: int = 3) -> float:
    """Median microseconds per call, over replays of one graph of call(0) ... call(calls - 1)."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    spans = [x.elapsed_time(y) for x, y in zip(marks, marks[1:], strict=False)]
    return statistics.median(spans) * 1000 / calls


def correctness(backend: TritonW4A16, device: Device) -> list[dict[str, object]]:
    """Bit-for-bit against fp64 over odd shapes, scale ranges, formats and dtypes."""
    rows: list[dict[str, object]] = []
    tried = (
        "gemm-bm16-bn64-sk4-w4-s4-g8",
        "gemm-bm64-bn128-sk1-w4-s3-g8",
        "gemm-bm128-bn128-sk2-w8-s3-g8",
        "tma-bm16-bn64-sk4-w4-s4-g8",
        "tma-bm64-bn128-sk2-w4-s3-g8",
        "tma-bm128-bn256-sk1-w8-s3-g8",
        "tma-bm256-bn128-sk1-w8-s3-g8",
    )
    tried = tuple(
        t
        for t in tried
        if parse(t).shared() <= shared_limit(device)
        and (t.startswith("gemm") or (device.sm or 0) >= 90)
    )
    jobs = []
    for fmt, dtype in (("nvfp4", "bf16"), ("nvfp4", "fp16"), ("mxfp4", "bf16")):
        for n, k in ((256, 512), (200, 1056), (4096, 4096), (33, 32)):
            for kind in ("middle", "subnormal", "maximal"):
                if dtype == "fp16" and kind == "maximal":
                    continue  # the outputs overflow
                jobs.append((fmt, dtype, n, k, kind))
    for fmt, dtype, n, k, kind in jobs:
        weight = draw(fmt, n, k, kind, device.torch, 1)
        problem = Problem(fmt, 1, n, k, out_dtype=dtype)
        state = backend.prepare(weight, problem)
        for m in (1, 5, 17, 130):
            a = activations(m, k, problem.dtype, device.torch)
            want = exact(a, weight)
            for tactic in tried:
                out = torch.full((m, n), float("nan"), dtype=problem.dtype, device=device.torch)
                try:
                    backend.run(state, a, out, tactic)
                    torch.cuda.synchronize()
                    bad = int((out != want).sum())
                except Exception as error:  # noqa: BLE001 - any failure is a result here
                    bad = f"{type(error).__name__}: {error}"[:300]
                rows.append(
                    dict(fmt=fmt, dtype=dtype, m=m, n=n, k=k, kind=kind, tactic=tactic, bad=bad)
                )
                if bad:
                    print("WRONG", rows[-1], flush=True)
    print(f"correctness: {sum(1 for r in rows if not r['bad'])} of {len(rows)} exact", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=150)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--shapes", default="", help="4096x4096:1,16;28672x4096:128")
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--variants", choices=("all", "old", "new", "candidates"), default="all")
    args = parser.parse_args()
    started = time.monotonic()
    major, minor = torch.cuda.get_device_capability()
    device = Device("cuda", major * 10 + minor, torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device.torch)
    backend = TritonW4A16()
    shapes = SHAPES
    if args.shapes:
        shapes = {}
        for part in args.shapes.split(";"):
            size, ms = part.split(":")
            n, k = (int(x) for x in size.split("x"))
            shapes[n, k] = tuple(int(x) for x in ms.split(","))
    plan = [Problem("nvfp4", m, n, k) for (n, k), ms in shapes.items() for m in ms]
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "gpu": properties.name,
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
    }

    jobs: dict[tuple, tuple[Problem, TileConfig]] = {}
    for problem in plan:
        for c in grid(problem, device, args.variants):
            key = (c.kernel, c.bm, c.bn, c.split > 1, c.warps, c.stages, c.group)
            jobs.setdefault(key, (problem, c))
    failures: dict[str, str] = {}

    def build(job: tuple[Problem, TileConfig]) -> None:
        try:
            with torch.cuda.device(device.torch):
                compile_for(*job)
        except Exception as error:  # noqa: BLE001
            failures[job[1].name] = f"{type(error).__name__}: {error}"[:300]

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(build, jobs.values()))
    built = time.monotonic() - started
    print(f"{len(jobs)} kernels built in {built:.1f} s, {len(failures)} failed", flush=True)
    for name, why in failures.items():
        print("BUILD", name, why)
    result |= {"built_s": built, "kernels": len(jobs), "build_failures": failures}
    tried = correctness(backend, device)
    result["correctness"] = {"tried": len(tried), "wrong": [row for row in tried if row["bad"]]}
    result["correct_s"] = time.monotonic() - started

    rows: list[dict[str, object]] = []
    result["rows"] = rows
    l2 = properties.L2_cache_size
    last: tuple[int, int] | None = None
    for problem in plan:
        n, k, m = problem.n, problem.k, problem.m
        if time.monotonic() - started > args.budget:
            print("out of time before", problem)
            break
        if last != (n, k):
            states = weights = want = None  # noqa: F841 - frees the memory
            torch.cuda.empty_cache()
            weight = draw("nvfp4", n, k, "middle", device.torch, 0)
            first = pack(weight, torch.bfloat16)
            size = first.words.nbytes + first.scales.nbytes
            copies = max(2, -(-2 * l2 // size) + 1)
            states = [first]
            for _ in range(copies - 1):
                states.append(
                    type(first)(
                        first.words.clone(), first.scales.clone(), first.gscale, n, k, first.dtype
                    )
                )
            full = dense(weight).to(torch.bfloat16)
            weights = [full.clone() for _ in range(max(2, -(-2 * l2 // full.nbytes) + 1))]
            last = (n, k)
        a = activations(m, k, torch.bfloat16, device.torch)
        want = exact(a, weight)
        outs = [torch.empty_like(want) for _ in range(4)]
        resident = timed(partial(_resident, weights, a, outs), max(8, len(weights)))
        calls = max(8 if m < 1024 else 4, len(states))
        times: dict[str, float] = {}
        for config in grid(problem, device, args.variants):
            if config.name in failures or time.monotonic() - started > args.budget:
                continue
            try:
                outs[0].fill_(float("nan"))
                backend.run(states[0], a, outs[0], config.name)
                if not torch.equal(outs[0], want):
                    print("WRONG", m, n, k, config.name, int((outs[0] != want).sum()), flush=True)
                    continue
                call = partial(_fused, backend, states, a, outs, config.name)
                times[config.name] = timed(call, calls)
            except Exception as error:  # noqa: BLE001
                print("FAILED", m, n, k, config.name, f"{type(error).__name__}: {error}"[:200])
        order = sorted(times.items(), key=lambda x: x[1])
        rows.append(dict(n=n, k=k, m=m, cublas=resident, times=dict(order)))
        args.out.write_text(json.dumps(result))
        best = "  ".join(f"{t} {us:.1f}" for t, us in order[: args.top])
        own = [times[t] for t in backend.tactics(problem, device) if t in times]
        print(
            f"{n}x{k} m={m:<5} cuBLAS {resident:7.1f}  own best {min(own, default=0.0):.1f}"
            f"  | {best}",
            flush=True,
        )
    result["host_us"] = host(backend, device)
    result["total_s"] = time.monotonic() - started
    args.out.write_text(json.dumps(result))
    print(f"done in {result['total_s']:.1f} s")


def host(backend: TritonW4A16, device: Device) -> dict[str, float]:
    """Microseconds of host time per eager call."""
    found = {}
    problem = Problem("nvfp4", 16, 4096, 4096)
    state = backend.prepare(draw("nvfp4", 4096, 4096, "middle", device.torch, 0), problem)
    a = activations(16, 4096, torch.bfloat16, device.torch)
    out = torch.empty((16, 4096), dtype=torch.bfloat16, device=device.torch)
    for tactic in (
        "gemm-bm16-bn64-sk1-w4-s4-g8",
        "gemm-bm16-bn64-sk4-w4-s4-g8",
        "tma-bm16-bn64-sk1-w4-s4-g8",
    ):
        if tactic.startswith("tma") and (device.sm or 0) < 90:
            continue
        backend.run(state, a, out, tactic)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(200):
            backend.run(state, a, out, tactic)
        found[tactic] = (time.perf_counter() - begin) * 1e6 / 200
        torch.cuda.synchronize()
        print("host us per call", tactic, round(found[tactic], 1))
    return found


if __name__ == "__main__":
    main()
