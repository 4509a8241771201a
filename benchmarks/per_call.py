"""What the wrapper around `flashinfer.mm_fp4` costs per call, beside the bare call.

The bare call is a Python function with FlashInfer's signature that returns at once, so that all
that is measured is the wrapper; each number is the least of many short runs, since others use the
machine too. Besides: what the plugin takes at an engine's start, by a store of two layers.

    python benchmarks/per_call.py --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import machine

ROOT = Path(__file__).resolve().parents[1]
CALLS, REPEATS = 100, 4000


def mm_fp4(
    a: Any, b: Any, a_descale: Any, b_descale: Any, alpha: Any = None,
    out_dtype: Any = torch.bfloat16, out: Any = None, block_size: int = 16,
    use_8x4_sf_layout: bool = False, backend: str = "auto", use_nvfp4: bool = True,
    enable_pdl: bool = True, *, batch_invariant: bool = False,
) -> Any:  # fmt: skip
    return out


def operands(m: int, n: int, k: int) -> list[Any]:
    a, b = torch.zeros(m, k // 2, dtype=torch.uint8), torch.zeros(k // 2, n, dtype=torch.uint8)
    scales = [torch.zeros(x, k // 16, dtype=torch.float8_e4m3fn) for x in (m, n)]
    return [a, b, scales[0], scales[1].T, torch.ones(1), torch.bfloat16]


def microseconds(call: Callable[[], Any]) -> float:
    return min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS * 1e6


def site_of(state: Path) -> Path:
    """A folder with a SGLang that has as much of a source tree as is read of one."""
    import engine_trees

    site = state / "site"
    if not site.exists():
        engine_trees.sglang(site)
    return site


STARTS = 9
START = """
import json, os, sys, time
began, cpu = time.perf_counter(), time.process_time()
from fp4tune.engines import sglang, plugin
imported = time.perf_counter()
from fp4tune.engines import here
here.gpus = list  # the driver is asked once, by a process of its own: see driver-cost.json
plugin.run("sglang", "would run", lambda: None)
done = time.perf_counter()
assert plugin.selection.cache_info().currsize == 1
print(json.dumps({"import_ms": (imported - began) * 1e3, "decide_ms": (done - imported) * 1e3,
                  "cpu_ms": (time.process_time() - cpu) * 1e3}))
"""


def started(state: Path, site: Path) -> dict[str, float]:
    """What the plugin takes in a fresh process of an engine: to be imported, and to decide."""
    environment = {**os.environ, "FP4TUNE_STATE": str(state), "FP4TUNE_LEVEL": "process"}
    environment["PYTHONPATH"] = str(site)
    done = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from engine_store import LAYERS, fill

    from fp4tune.cache import reader
    from fp4tune.engines import per_call

    state = Path(tempfile.mkdtemp(prefix="per-call-"))
    fill(state, "sm120", {"flashinfer-cutlass": 5.0, "flashinfer-cudnn": 6.0})
    wrapped = per_call.wrap(mm_fp4, reader.open(state))
    n, k = LAYERS[0]
    kinds: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "left: a layer that was not probed": (operands(3, 64, k), {"backend": "cudnn"}),
        "left: the proven backend was asked for": (operands(3, n, k), {"backend": "cutlass"}),
        "left: another layout": (operands(3, n, k), {"backend": "trtllm"}),
        "left: an unknown parameter": (
            operands(3, n, k), {"backend": "cudnn", "batch_invariant": True},
        ),
        "left: as vLLM calls it": (
            operands(3, 64, k), {"block_size": 16, "use_8x4_sf_layout": False, "backend": "cudnn"},
        ),
        "another backend": (operands(3, n, k), {"backend": "cudnn"}),
    }  # fmt: skip
    rows = {}
    for name, (args, named) in kinds.items():
        bare = microseconds(lambda args=args, named=named: mm_fp4(*args, **named))
        with_it = microseconds(lambda args=args, named=named: wrapped(*args, **named))
        rows[name] = {
            "bare_us": round(bare, 3),
            "wrapped_us": round(with_it, 3),
            "ratio": round(with_it / bare, 2),
        }
        print(name, rows[name])
    starts = [started(state, site_of(state)) for _ in range(STARTS)]
    worst = max(row["ratio"] for name, row in rows.items() if name.startswith("left"))
    document = {
        "machine": machine(),
        "per_call": rows,
        "worst_ratio_of_a_call_that_is_left": worst,
        "start": {name: round(min(start[name] for start in starts), 1) for name in starts[0]},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "per-call.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"worst ratio of a call that is left as it is: {worst}; start {document['start']}")
    return 0 if worst < 8 else 1


if __name__ == "__main__":
    raise SystemExit(main())
