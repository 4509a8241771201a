"""Run the ``marlin`` and ``humming`` backends on this GPU and say what they compute and cost.

For each backend, format, dtype and shape: time to build and to prepare, then for each m the
relative error against fp64 on the dequantised weight, on three kinds of data (``exact``: every fp32
sum is exact, so bit-exactness is counted; ``ordinary``; ``subnormal``: e4m3 block scales below
2^-6), host time of an eager call and time in a CUDA graph. Also m = 0, a strided activation, and a
tactic used for an m it was not chosen for. A failure is recorded with its traceback and the next
thing is tried (a CUDA error spoils the rest of the process: then run the other backend alone).

    python benchmarks/try_w4a16.py --out result.json [--backend marlin --backend humming]
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fp4tune.probes.backends import tactics
from fp4tune.probes.backends.humming import Humming
from fp4tune.probes.backends.sglang_marlin.marlin import Marlin
from fp4tune.probes.problem import FORMATS, Device, Fp4Tensor, Problem

BACKENDS = {"marlin": Marlin, "humming": Humming}
SHAPES = [(4096, 4096), (4096, 512), (1024, 4096), (320, 192), (200, 96)]
MS = [1, 8, 17, 128, 500, 2048]
KINDS = ["exact", "ordinary", "subnormal"]

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def weight(kind: str, format_name: str, n: int, k: int, draw: torch.Generator) -> Fp4Tensor:
    """A weight on the GPU; scale bytes are drawn from a range that makes its kind."""
    fmt = FORMATS[format_name]
    e4m3 = {"exact": (0x38, 0x58), "ordinary": (0x10, 0x60), "subnormal": (1, 8)}
    e8m0 = {"exact": (127, 131), "ordinary": (110, 124), "subnormal": (60, 64)}
    low, high = (e4m3 if fmt.scale == "e4m3" else e8m0)[kind]

    def bytes_(columns: int, low: int, high: int) -> torch.Tensor:
        return torch.randint(
            low, high, (n, columns), dtype=torch.uint8, device="cuda", generator=draw
        )

    scales = bytes_(k // fmt.block, low, high)
    if kind == "exact" and fmt.scale == "e4m3":
        scales &= 0xF8  # powers of two
    alpha = {"exact": 2.0**-4, "ordinary": 0.0123, "subnormal": 1.0}[kind]
    alpha = alpha if fmt.has_global else 1.0
    codes = bytes_(k // 2, 0, 256)
    return Fp4Tensor(fmt, codes, scales, torch.tensor(alpha, device="cuda"))


def dequantised(w: Fp4Tensor) -> torch.Tensor:
    """The weight's values, fp64 (n, k)."""
    table = torch.cat((E2M1, -E2M1)).cuda()
    codes = torch.stack((w.codes & 15, w.codes >> 4), dim=2).flatten(1).int()
    if w.format.scale == "e4m3":
        scales = w.scales.view(torch.float8_e4m3fn).double()
    else:
        scales = torch.exp2(w.scales.double() - 127)
    return table[codes] * scales.repeat_interleave(w.format.block, 1) * w.global_scale.double()


def activation(kind: str, problem: Problem, m: int, draw: torch.Generator) -> torch.Tensor:
    if kind == "exact":
        a = torch.randint(-4, 5, (m, problem.k), device="cuda", generator=draw)
    else:
        a = torch.randn(m, problem.k, device="cuda", generator=draw)
    return a.to(problem.dtype)


def errors(got: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
    """How `got` differs from fp64 `right`: relative Frobenius error, elements not rounded right."""
    wrong = got.double() - right
    return {
        "relative": float(wrong.norm() / right.norm()),
        "differing": int((got != right.to(got.dtype)).sum()),
        "elements": got.numel(),
        "not_finite": int((~torch.isfinite(got)).sum()),
    }


def host_us(call: Callable[[], None], calls: int = 300) -> float:
    """Host microseconds of an eager call, the GPU not waited for."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * elapsed / calls


def graph_us(call: Callable[[], None], launches: int = 50, replays: int = 5) -> float:
    """Microseconds of a call inside a CUDA graph of `launches`, caches warm."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / (launches * replays)


def times(call: Callable[[], None]) -> dict[str, Any]:
    return {"host_us": host_us(call), "graph_us": graph_us(call)}


def attempt(
    results: list[dict[str, Any]], where: dict[str, Any], work: Callable[..., Any], *args: Any
) -> Any:
    """Call `work`, record what it returns or how it failed, print one line, return its value."""
    start = time.perf_counter()
    try:
        value = work(*args)
        torch.cuda.synchronize()
        record = {"ok": True, **(value if isinstance(value, dict) else {})}
    except Exception as error:
        value, record = None, {"ok": False, "error": repr(error), "trace": traceback.format_exc()}
    record["seconds"] = round(time.perf_counter() - start, 3)
    results.append({**where, **record})
    shown = {key: v for key, v in results[-1].items() if key != "trace"}
    print(json.dumps(shown), flush=True)
    if not record["ok"]:
        print(record["trace"], flush=True)
    return value


def one_shape(
    backend: Any, device: Device, shape: Problem, results: list[dict[str, Any]], timed: bool
) -> None:
    """All data kinds and every m for one (n, k), prepared once for each kind."""
    where = {"backend": backend.name, "format": shape.format, "dtype": shape.out_dtype}
    where |= {"n": shape.n, "k": shape.k}
    draw = torch.Generator(device="cuda").manual_seed(1)
    for kind in KINDS:
        w = weight(kind, shape.format, shape.n, shape.k, draw)
        values = dequantised(w)
        here = {**where, "kind": kind}
        state = attempt(results, {**here, "step": "prepare"}, backend.prepare, w, shape)
        if state is None:
            continue
        for m in MS:
            problem = shape.at(m)
            (tactic,) = tactics(backend, problem, device)
            a = activation(kind, problem, m, draw)
            out = torch.full((m, shape.n), float("nan"), dtype=problem.dtype, device="cuda")

            def call(a=a, out=out, tactic=tactic, state=state) -> None:
                backend.run(state, a, out, tactic)

            def check(call=call, a=a, out=out, values=values, tactic=tactic) -> dict[str, Any]:
                call()
                found = {"tactic": tactic, **errors(out, a.double() @ values.T)}
                first = out.clone()
                out.fill_(float("nan"))
                call()
                return found | {"same_again": torch.equal(first, out)}

            done = attempt(results, {**here, "m": m, "step": "run"}, check)
            if done and timed and kind == "ordinary":
                attempt(results, {**here, "m": m, "step": "time"}, times, call)
        if kind == "exact":
            oddities(backend, device, shape, state, values, results, here)


def oddities(
    backend: Any,
    device: Device,
    shape: Problem,
    state: Any,
    values: torch.Tensor,
    results: list[dict[str, Any]],
    where: dict[str, Any],
) -> None:
    """m = 0, a strided activation, a tactic pinned for another m, and no named tactic."""
    draw = torch.Generator(device="cuda").manual_seed(2)
    (tactic,) = tactics(backend, shape.at(17), device)

    def run(a: torch.Tensor, name: str) -> dict[str, Any]:
        files = len(backend.files())
        out = torch.full((a.shape[0], shape.n), float("nan"), dtype=shape.dtype, device="cuda")
        backend.run(state, a, out, name)
        found = errors(out, a.double() @ values.T) if a.shape[0] else {}
        return found | {"files_before": files, "files_after": len(backend.files())}

    whole = activation("exact", shape, 100, draw)
    wide = activation("exact", Problem(shape.format, 1, 8, 2 * shape.k), 17, draw)
    wide = wide.to(shape.dtype)
    tries = {
        "m=0": (whole[:0], tactic),
        "strided rows": (wide[:, : shape.k], tactic),
        "m=3, tactic of m=17": (whole[:3], tactic),
        "m=100, tactic of m=17": (whole, tactic),
        "m=17, no tactic named": (whole[:17], "default"),
    }
    for name, (a, used) in tries.items():
        attempt(results, {**where, "step": name}, run, a, used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", choices=list(BACKENDS), action="append")
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    device = Device("cuda", 10 * major + minor)
    results: list[dict[str, Any]] = []
    for name in options.backend or list(BACKENDS):
        backend: Any = BACKENDS[name]()
        shapes = [
            Problem(format_name, 1, n, k, out_dtype=out_dtype)
            for format_name in FORMATS
            for out_dtype in ("bf16", "fp16")
            for n, k in (SHAPES if out_dtype == "bf16" else SHAPES[:1] + SHAPES[-1:])
        ]
        reasons = {shape: backend.unsupported(shape, device) for shape in shapes}
        for reason in sorted({r for r in reasons.values() if r}):
            print(f"{name}: {reason}", flush=True)
            results.append({"backend": name, "step": "unsupported", "reason": reason})
        shapes = [shape for shape in shapes if reasons[shape] is None]
        if not shapes:
            continue
        wanted = [shape.at(m) for shape in shapes for m in MS]
        for step in ("build", "build again"):
            where = {"backend": name, "step": step}
            attempt(results, where, backend.build, wanted, device, options.workers)
        for shape in shapes:
            timed = shape.out_dtype == "bf16"
            where = {"backend": name, "step": "shape", "n": shape.n, "k": shape.k}
            attempt(results, where, one_shape, backend, device, shape, results, timed)
        results.append({"backend": name, "files": [str(path) for path in backend.files()]})
        options.out.write_text(json.dumps(results, indent=1))
    options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
