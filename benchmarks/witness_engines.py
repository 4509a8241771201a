"""The witness in the engines' own Python, up to the operator. Needs no GPU.

Wheels of vLLM and SGLang are unpacked, not installed, as in engines_real.py. Their own kernel
classes and linear methods prepare a layer and apply it, with the plugin's hooks around them,
eagerly and in one graph of torch.compile; what stands in is what a GPU or a compiled extension
computes. For each kernel: rows that the witness judged, whether a right layer is suspected, whether
a broken one is confirmed, and in how many graphs torch.compile cut it.

    python benchmarks/witness_engines.py --out DIR [--work DIR] [--seconds 500]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import engines_real
from _machine import machine, write

COMMON = '''
import json, os, sys, traceback
import torch
from fp4tune.engines import watching
from fp4tune.probes.formats import dequantise, quantise
from fp4tune.probes.layouts import swizzle, unswizzle
from fp4tune.probes.problem import NVFP4, Fp4Tensor
from fp4tune.witness import process

N, K, M = 256, 256, 6
RAW, WRONG = {}, []

def weight(seed=1):
    return quantise(torch.randn(N, K, generator=torch.Generator().manual_seed(seed)), NVFP4)

def broken(out):
    if WRONG:
        out[:, 128:256] = 0
    return out

def report(name, serve, x, compiled=True):
    """Serve right, compiled, and broken; what the witness says of each."""
    own = process.mine()
    found = {"kernel": name}
    def counted():
        own.witness.look()
        return sum(each.counts["rows"] for each in own.witness.layers())
    before, faults = counted(), len(own.responder.faults)
    serve(x)
    found["rows"] = counted() - before
    found["suspected when right"] = len(own.responder.faults) - faults
    if compiled:
        from torch._dynamo.testing import CompileCounterWithBackend
        graphs = CompileCounterWithBackend("aot_eager")
        try:
            run = torch.compile(lambda x: serve(x).relu(), backend=graphs, fullgraph=True)
            run(x)
            found["graphs"] = graphs.frame_count
        except Exception as error:
            found["graphs"] = f"{type(error).__name__}: {str(error)[:300]}"
        found["rows compiled"] = counted() - before - found["rows"]
    WRONG.append(1)
    serve(x)
    own.witness.look()
    WRONG.clear()
    found["confirmed when broken"] = sorted(
        {f["status"] for f in own.responder.faults[faults:]}) or None
    if own.witness.left_alone:
        found["left alone"] = dict(own.witness.left_alone)
    print("RESULT " + json.dumps(found), flush=True)

def layer_of(w, bias):
    layer = torch.nn.Module()
    layer.prefix = "model.layers.0.mlp.down_proj"
    layer.output_size_per_partition, layer.input_size_per_partition = N, K
    layer.params_dtype = torch.bfloat16
    layer.weight = torch.nn.Parameter(w.codes.clone(), False)
    layer.weight_scale = torch.nn.Parameter(w.scales.clone().view(torch.float8_e4m3fn), False)
    layer.bias = torch.nn.Parameter(bias.clone(), False) if bias is not None else None
    return layer

def activation():
    return torch.randn(M, K, generator=torch.Generator().manual_seed(5)).bfloat16()

def each(*tries):
    for one in tries:
        try:
            one()
        except BaseException:
            print("RESULT " + json.dumps({"kernel": one.__name__, "failed":
                  traceback.format_exc()[-1500:]}), flush=True)
    process.end()
'''

VLLM = """
import sitecustomize
library = sitecustomize.extension()
sitecustomize.simulate()
import torch
for one in (
    "gptq_marlin_repack(Tensor q, int k, int n, int bits, bool a8=False) -> Tensor",
    "cutlass_scaled_fp4_mm(Tensor! out, Tensor a, Tensor b, Tensor sa, Tensor sb, Tensor al) -> ()",
):
    library.define(one)

def repack(q, k, n, bits, a8=False):
    return torch.zeros(k // 16, n * 2, dtype=torch.int32)

def cutlass(out, a, b, sa, sb, alpha):
    m, k = a.shape[0], 2 * a.shape[1]
    scales = unswizzle(sa.view(torch.uint8).reshape(-1), m, k // 16, "128x4")
    left = dequantise(Fp4Tensor(NVFP4, a.view(torch.uint8), scales, torch.ones(())))
    out.copy_(broken((left @ RAW[b.data_ptr()].T * alpha).to(out.dtype)))

library.impl("gptq_marlin_repack", repack, "CPU")
library.impl("cutlass_scaled_fp4_mm", cutlass, "CPU")
watching.install("vllm")
from vllm.model_executor.layers.quantization.utils import marlin_utils
mine = torch.library.Library("vllm", "FRAGMENT")

def gemm(a, q, bias, scales, a_scales, factor, zeros, workspace, *rest):
    out = a.float() @ RAW[q.data_ptr()].T
    return broken((out if BIAS is None else out + BIAS.float()).to(a.dtype))

mine.impl("marlin_gemm", gemm, "CPU")
BIAS = None

def marlin():
    global BIAS
    from vllm.model_executor.kernels.linear.nvfp4 import marlin as module
    for bias in (None, torch.randn(N).bfloat16()):
        BIAS = bias
        kernel = object.__new__(module.MarlinNvFp4LinearKernel)
        w = weight()
        layer = layer_of(w, bias)
        layer.weight_global_scale = torch.nn.Parameter(w.global_scale.clone(), False)
        kernel.process_weights_after_loading(layer)
        RAW[layer.weight.data_ptr()] = dequantise(w)
        name = "MarlinNvFp4LinearKernel" + (" with a bias" if bias is not None else "")
        report(name, lambda x: kernel.apply_weights(layer, x, layer.bias), activation())

torch.Tensor.cuda = lambda self, *_, **__: self

def cutlass_kernel():
    from vllm.model_executor.kernels.linear.nvfp4 import cutlass as module
    def quant(x, scale, **more):
        a = quantise(x.float(), NVFP4, 1 / scale.reshape(()))
        return a.codes, swizzle(a.scales, "128x4").view(torch.float8_e4m3fn).view(-1, K // 16)
    module.scaled_fp4_quant = quant
    kernel = object.__new__(module.CutlassNvFp4LinearKernel)
    w = weight(2)
    layer = layer_of(w, None)
    layer.weight_global_scale = torch.nn.Parameter(w.global_scale.clone(), False)
    layer.input_global_scale_inv = torch.nn.Parameter(torch.tensor(500.0), False)
    layer.alpha = torch.nn.Parameter(w.global_scale / 500.0, False)
    kernel.process_weights_after_loading(layer)
    RAW[layer.weight.data_ptr()] = dequantise(w, with_global=False)
    serve = lambda x: kernel.apply_weights(layer, x)
    report("CutlassNvFp4LinearKernel", serve, activation(), False)

each(marlin, cutlass_kernel)
"""

SGLANG = """
import sitecustomize
import torch
FUNCTIONS, kept = {}, []
from sglang.srt.utils import custom_op
inside = custom_op.CustomOpWrapper.__init__

def keeping(self, *, op_name, op_func, **more):
    FUNCTIONS[op_name] = op_func
    inside(self, op_name=op_name, op_func=op_func, **more)

custom_op.CustomOpWrapper.__init__ = keeping  # its operators are for GPUs: their bodies, for a CPU
watching.install("sglang")

def modelopt():
    import importlib, types
    marlin_utils = importlib.import_module("sglang.srt.layers.quantization.marlin_utils_fp4")
    module = importlib.import_module("sglang.srt.layers.quantization.modelopt_quant")
    marlin_utils.gptq_marlin_repack = lambda b_q_weight, perm, size_k, size_n, num_bits, **_: (
        torch.zeros(size_k // 16, size_n * 2, dtype=torch.int32))
    marlin_utils.gptq_marlin_gemm = lambda **given: broken(
        (given["a"].float() @ RAW[given["b_q_weight"].data_ptr()].T).to(given["a"].dtype))
    for name in ("marlin_make_workspace", "marlin_make_workspace_new"):
        if hasattr(marlin_utils, name):
            setattr(marlin_utils, name, lambda *_, **__: torch.zeros(1, dtype=torch.int32))
    if hasattr(marlin_utils, "should_use_atomic_add_reduce"):
        marlin_utils.should_use_atomic_add_reduce = lambda **_: False
    kept.append(torch.library.Library("sglang", "FRAGMENT"))
    kept[0].impl("apply_fp4_marlin_linear", FUNCTIONS["apply_fp4_marlin_linear"], "CPU")
    chosen = types.SimpleNamespace(is_marlin=lambda: True, value="marlin")
    module.get_fp4_gemm_runner_backend = lambda: chosen
    from sglang.srt.layers.quantization import fp4_utils
    fp4_utils.get_fp4_gemm_runner_backend = lambda: chosen
    method = object.__new__(module.ModelOptFp4LinearMethod)
    method.quant_mode = "w4a4"
    method.quant_config = types.SimpleNamespace(group_size=16, is_awq=False)
    for bias in (None, torch.randn(N).bfloat16()):
        w = weight(3)
        layer = layer_of(w, bias)
        layer.input_scale = torch.nn.Parameter(torch.ones(1), False)
        layer.weight_scale_2 = torch.nn.Parameter(w.global_scale.reshape(1).clone(), False)
        method.process_weights_after_loading(layer)
        RAW[layer.weight.data_ptr()] = dequantise(w)
        name = "ModelOptFp4LinearMethod, marlin" + (" with a bias" if bias is not None else "")
        report(name, lambda x: method.apply(layer, x, layer.bias), activation(), False)

each(modelopt)
"""
ENGINES = {"vllm": ("0.33.0", VLLM), "sglang": ("0.5.23", SGLANG)}


def tried(work: Path, engine: str, seconds: float) -> dict[str, Any]:
    release, program = ENGINES[engine]
    tree = engines_real.unpacked(work, engine, release)
    python = engines_real.python_for(work, engines_real.RELEASES[engine][release])
    state = work / "state"
    state.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "REAL_ENGINE": engine,
        "REAL_SM": "90",
        "HOME": str(work),
        "PYTHONPATH": f"{engines_real.beside(work)}:{tree}",
        "FP4TUNE_STATE": str(state),
        "FP4TUNE_LEVEL": "watch",
        "FP4TUNE_WATCH": "every",
        "FP4TUNE_WATCH_COPIES": "1",
        "FP4TUNE_ON_FAULT": "log",
        "VLLM_PLUGINS": "",
    }
    try:
        done = subprocess.run(
            [str(python), "-c", COMMON + program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out, err = str(late.stdout or ""), f"not done in {seconds:.0f} s"
    results = [json.loads(x[7:]) for x in out.splitlines() if x.startswith("RESULT ")]
    found: dict[str, Any] = {"release": release, "kernels": results}
    if not results:
        found["failed"] = err[-1500:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "fp4tune-engines"
    )
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--only", choices=tuple(ENGINES))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    report: dict[str, Any] = {"machine": machine()}
    for engine in (options.only,) if options.only else ENGINES:
        left = options.seconds - (time.monotonic() - start)
        report[engine] = tried(options.work, engine, max(10.0, left))
        print(json.dumps({engine: report[engine]}, indent=1))
        write(options.out / "witness_engines.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
