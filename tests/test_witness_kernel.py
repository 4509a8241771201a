"""The kernel against its twin in torch: by Triton's interpreter, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TWIN = """
import json, random, sys
import torch
from dataclasses import replace
from fp4tune.probes.formats import DTYPES, dequantise, quantise
from fp4tune.probes.layouts import swizzle
from fp4tune.probes.problem import FORMATS
from fp4tune.witness import here, launch, limits, rows, vectors

torch.set_num_threads(1)
kind, dtype, layout, grouped, bias, seed = json.loads(sys.argv[1])
g = torch.Generator().manual_seed(seed)
m, n, k = 11, 1216, 192
experts = 3 if grouped else 1
fmt = "mxfp4" if kind == "mxfp4" else "nvfp4"
weights = [quantise(torch.randn(n, k, generator=g) * 2.0**e, FORMATS[fmt]) for e in range(experts)]
sums = vectors.sums_of(weights, vectors.draw_signs(n, g))
x = torch.randn(m, k, generator=g)
routed = torch.randint(-1, experts, (m,), generator=g, dtype=torch.int32) if grouped else None
a = x.to(DTYPES[dtype]) if kind == "bf16" else quantise(x, FORMATS[kind])
left = dequantise(a, torch.float64, with_global=False) if kind != "bf16" else a.double()
factor = 1.0 if kind == "bf16" else float(a.global_scale)
added = torch.randn(n, generator=g).to(DTYPES[dtype]) if bias else None
y = torch.zeros(m, n, dtype=DTYPES[dtype])
for row in range(m):
    expert = 0 if routed is None else int(routed[row])
    if expert >= 0:
        exact = factor * left[row] @ dequantise(weights[expert], torch.float64).T
        y[row] = (exact if added is None else exact + added.double()).to(y.dtype)
wrong = y.clone()
wrong[2, 256:384] = 0
wrong[5, 1000] = float("nan")
wrong[7] *= 2
if kind == "bf16":
    a[9, 3] = float("inf")
    wrong[9] = float("nan")
else:
    a = replace(a, global_scale=torch.ones(()))
    if layout != "linear":
        a = replace(a, scales=swizzle(a.scales, layout))
limit = limits.limit(dtype, sums.groups.width, k)
gone = []
shapes = (launch.Cut(4, 1024, 128, 4), None) if seed == 1 else (launch.Cut(4, 1024, 128, 4),)
for shape in shapes:
    for out in (y, wrong):
        call = rows.WatchedCall(a, out, torch.tensor([factor]), added, routed, layout)
        cut = 1 if shape is None else shape.rows
        benches = []
        for _ in range(2):
            benches.append(
                launch.bench(torch.device("cpu"), 2, 64, launch.evidence_bytes(k, 1024))
            )
        site = launch.CallSite(1, 3, 2)
        for _ in range(2):
            here.look(call, sums, limit, benches[0], site, cut)
            launch.launch(call, sums, limit, benches[1], site, shape)
        mine, twin = benches
        assert torch.equal(mine.counters, twin.counters), (mine.counters, twin.counters)
        assert torch.equal(mine.ring_state, twin.ring_state)

        def records(bench):
            found = {}
            for index in range(int(bench.ring_state[0])):
                raw = bench.ring[index]
                head = raw[:64].view(torch.int64)[1:7].tolist()
                found[tuple(head)] = (raw[64:76].view(torch.float32), bytes(raw[128:].numpy()))
            return found

        ours, theirs = records(mine), records(twin)
        assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
        for key in ours:
            assert ours[key][1] == theirs[key][1], key
            torch.testing.assert_close(
                ours[key][0], theirs[key][0], rtol=1e-4, atol=1e-4, equal_nan=True
            )
        gone.append(int(mine.counters[1, 2]))
print(json.dumps(gone))
"""

CASES = [("nvfp4", "bf16", "128x4", False, True, 4)]
SLOW = [
    ("bf16", "bf16", "linear", False, False, 1),
    ("bf16", "fp16", "linear", False, True, 2),
    ("bf16", "bf16", "linear", True, False, 3),
    ("nvfp4", "fp16", "8x4", True, False, 5),
    ("mxfp4", "bf16", "linear", False, True, 6),
]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda case: "-".join(map(str, case)),
)
def test_the_kernel_counts_and_records_what_its_twin_does(case):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWIN, json.dumps(case)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counted = json.loads(done.stdout)
    assert set(counted[::2]) == {0} and min(counted[1::2]) > 0


COMPILES = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fp4tune.witness import _kernels

kernel, kind = _kernels.witness, int(sys.argv[2])
types = {name: "i32" for name in kernel.arg_names}
for name in ("y", "bias"):
    types[name] = "*i16"
for name in ("sums", "alpha_w", "alpha_a"):
    types[name] = "*fp32"
for name in ("of_y", "of_sum", "floor", "overflow"):
    types[name] = "fp32"
for name in ("counters", "ring_state"):
    types[name] = "*i64"
types |= {"a": "*i16" if kind < 2 else "*u8", "a_scales": "*u8", "ring": "*u8", "signs": "*i8"}
types |= {"experts": "*i32", "gate": "*i32"}
fixed = {
    "A_KIND": kind, "LAYOUT": 1, "Y_BF16": True, "HAS_BIAS": True, "GROUPED": kind == 3,
    "ROWS": 4, "BLOCK_N": 1024, "BLOCK_K": 1024, "STEP": 1024 if kind < 2 else 512,
}
types |= dict.fromkeys(fixed, "constexpr")
at = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
target = GPUTarget("cuda", int(sys.argv[1]), 32)
made = compile(ASTSource(kernel, types, at), target=target, options={"num_warps": 8})
assert len(made.asm["cubin"]) > 1000
"""


@pytest.mark.parametrize(
    ("sm", "kind"),
    [
        (90, 0),
        *(pytest.param(sm, k, marks=pytest.mark.slow) for sm in (100, 120) for k in (1, 2, 3)),
    ],
)
def test_the_kernel_compiles_without_a_gpu(sm, kind, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILES, str(sm), str(kind)],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
