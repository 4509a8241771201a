"""Compile for Blackwell what can be compiled without one: SM100, SM103 and SM120; no GPU needed.

    python benchmarks/compile_blackwell.py [--sm 120 ...] [--unit FILE.o ...] [--out RESULT.json]

* ``triton-w4a16``: every candidate kernel of the shapes below, by Triton and its ptxas; with its
  tensor-core instructions, and its shared memory against what a block may have.
* ``--unit``: objects that `benchmarks/audit_flashinfer.py build` made of FlashInfer's CUTLASS FP4
  GEMM (minutes and 6 GB each, so not made again here): for which SM there is machine code, and
  with which tensor-core instructions.
* ``cudnn-graph``: whether cuDNN plans its graphs for a GPU that is not here. It loads the driver's
  library even to read a device's description, so without a driver the answer is only that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from fp4tune.probes.audit import disassemble
from fp4tune.probes.backends import cudnn_graph
from fp4tune.probes.backends.triton_w4a16 import _tactics as tactics
from fp4tune.probes.backends.triton_w4a16 import gemm as w4a16
from fp4tune.probes.problem import Device, Problem

SMS = (100, 103, 120)
MS = (1, 64, 512)
N = K = 4096


def triton_kernel(problem: Problem, config: tactics.Config, sm: int) -> dict[str, Any]:
    """Compile the GEMM of one configuration; what ptxas made of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fp4tune.probes.backends.triton_w4a16 import _kernels as kernels

    mx, half = problem.format == "mxfp4", problem.out_dtype
    tma = config.kernel == "tma"
    pointers = {
        "a": f"tensordesc<{half}[{config.bm}, {tactics.TILE_K}]>" if tma else f"*{half}",
        "words": "*i32",
        "scales": "*u8" if mx else "*i16",
        "gscale": "*fp32",
        "out": "*fp32" if config.split > 1 else f"*{half}",
    }
    constants = dict(w4a16._constants(config, mx, half == "bf16"))  # it keeps what it made
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    names = kernels.gemm.arg_names
    sixteen = [x for x in (*pointers, "n", "k", "stride_a", "n_pad") if not (tma and x == "a")]
    source = ASTSource(
        kernels.gemm,
        {x: pointers.get(x, "constexpr" if x in constants else "i32") for x in names},
        {(names.index(x),): value for x, value in constants.items()},
        {(names.index(x),): [["tt.divisibility", 16]] for x in sixteen},
    )
    start = time.monotonic()
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        code = disassemble.machine_code_of(file.name)
    mma = sum((Counter(k.kernel.mma) for k in code.kernels), Counter[str]())
    limit = tactics.shared_limit(Device("cuda", sm))
    return {
        "m": problem.m,
        "format": problem.format,
        "tactic": config.name,
        "sms": list(code.sms),
        "instructions": dict(mma),
        "shared_bytes": made.metadata.shared,
        "fits": made.metadata.shared <= limit,
        "seconds": round(time.monotonic() - start, 1),
    }


def triton_kernels(sm: int) -> list[dict[str, Any]]:
    rows = []
    for fmt in ("nvfp4", "mxfp4"):
        for m in MS:
            problem = Problem(fmt, m, N, K)
            for config in tactics.candidates(problem, Device("cuda", sm)):
                try:
                    rows.append(triton_kernel(problem, config, sm))
                except Exception as error:  # what a compiler raises
                    why = f"{type(error).__name__}: {error}".splitlines()[0]
                    rows.append({"m": m, "format": fmt, "tactic": config.name, "failed": why})
                print(sm, rows[-1], flush=True)
    return rows


def unit(path: Path) -> dict[str, Any]:
    """What machine code an object of FlashInfer's holds."""
    code = disassemble.machine_code_of(path)
    mma = sum((Counter(k.kernel.mma) for k in code.kernels), Counter[str]())
    return {
        "unit": path.stem,
        "sms": list(code.sms),
        "kernels": len(code.kernels),
        "instructions": dict(mma),
        "problem": code.problem,
    }


def cudnn_plans(sm: int) -> dict[str, Any]:
    """How many plans cuDNN has for each graph on a GPU like this one but of another SM."""
    try:
        cudnn = cudnn_graph.library()
        here = json.loads(bytes(cudnn.create_device_properties(0).serialize()))
        there = json.dumps({**here, "deviceVer": 10 * sm})
        described = cudnn.create_device_properties(there)
    except Exception as error:  # whatever the frontend raises without a driver
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    found: dict[str, Any] = {}
    for backend in cudnn_graph.backends():
        for fmt in ("nvfp4", "mxfp4"):
            problem = Problem(fmt, 128, N, K, activation=backend.activation)
            key = cudnn_graph.Key(128, N, K, fmt, backend.activation, problem.dtype, fmt == "nvfp4")
            try:
                graph = cudnn.pygraph(device_property=described)
                cudnn_graph.describe(cudnn, graph, key)
                cudnn_graph.plan(cudnn, graph)
                found[f"{backend.name} {fmt}"] = graph.get_execution_plan_count()
            except Exception as error:
                found[f"{backend.name} {fmt}"] = f"{type(error).__name__}: {error}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sm", type=int, action="append", default=[])
    parser.add_argument("--unit", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    sms = tuple(asked.sm) or SMS
    with tempfile.TemporaryDirectory(prefix="fp4tune-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        found = {
            "machine": {
                "date": date.today().isoformat(),
                "system": f"{platform.system()} {platform.machine()}, no GPU",
                "triton": metadata.version("triton"),
            },
            "triton-w4a16": {f"sm{sm}": triton_kernels(sm) for sm in sms},
            "flashinfer-cutlass": [unit(path) for path in asked.unit],
            "cudnn-graph": {f"sm{sm}": cudnn_plans(sm) for sm in sms},
        }
    text = json.dumps(found, indent=1) + "\n"
    if asked.out:
        asked.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
