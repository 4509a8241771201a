"""The witness on a GPU: the kernel against its twin, in graphs, and while others capture."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fp4tune.probes.formats import DTYPES, dequantise, quantise
from fp4tune.probes.layouts import swizzle
from fp4tune.probes.problem import NVFP4, Problem
from fp4tune.witness import here, launch, limits, rows, vectors
from fp4tune.witness.confirm import FAULT
from fp4tune.witness.sources import host_copy
from fp4tune.witness.watcher import WatchSubject, Witness, WitnessOptions

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def weight(n: int, k: int, seed: int = 1):
    return quantise(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), NVFP4)


@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1024, 512), (17, 2304, 768), (300, 4096, 1024)])
def test_the_kernel_counts_what_its_twin_does(m, n, k, dtype, fp4):
    w, seeded = weight(n, k), torch.Generator().manual_seed(m)
    sums = vectors.sums_of([w], vectors.draw_signs(n, seeded))
    x = torch.randn(m, k, generator=seeded)
    a = quantise(x, NVFP4) if fp4 else x.to(DTYPES[dtype])
    left = dequantise(a, torch.float64) if fp4 else a.double()
    y = (left @ dequantise(w, torch.float64).T).to(DTYPES[dtype])
    y[m // 2, 128:256] = 0
    y[0, 5] = float("nan")
    factor = torch.tensor([float(a.global_scale) if fp4 else 1.0])
    if fp4:
        a = type(a)(NVFP4, a.codes, swizzle(a.scales, "128x4"), torch.ones(()))
    limit = limits.limit(dtype, sums.groups.width, k)
    layout = "128x4" if fp4 else "linear"
    call = rows.WatchedCall(a, y, factor, scale_layout=layout)
    there = rows.WatchedCall(a.to(GPU), y.to(GPU), factor.to(GPU), scale_layout=layout)
    bytes_ = launch.evidence_bytes(k, 1024)
    mine = launch.bench(torch.device("cpu"), 2, 64, bytes_)
    twin = launch.bench(GPU, 2, 64, bytes_)
    cut = launch.cut(m, sums.groups.count, sums.groups.width, k)
    here.look(call, sums, limit, mine, launch.CallSite(1), cut.rows)
    launch.launch(there, sums.to(GPU), limit, twin, launch.CallSite(1))
    assert torch.equal(mine.counters, twin.counters.cpu())
    assert torch.equal(mine.ring_state, twin.ring_state.cpu())
    assert int(mine.counters[1, 2]) == min(m, 2) and not int(mine.counters[1, 3])

    def evidence(bench):
        ring = bench.ring.cpu()
        return {bytes(ring[i, 128:].numpy()) for i in range(int(bench.ring_state[0]))}

    assert evidence(mine) == evidence(twin)


def watched(n: int = 2048, k: int = 1024):
    w = weight(n, k).to(GPU)
    values = dequantise(w, torch.bfloat16).T.contiguous()
    judged = []
    witness = Witness(WitnessOptions("every"), lambda *found: judged.append(found))
    subject = WatchSubject("layer", "mine", Problem("nvfp4", 1, n, k))
    return witness, witness.add(subject, [w], host_copy([w])), values, judged


def test_a_captured_call_is_watched_at_every_replay_and_a_fault_in_one_is_confirmed():
    witness, mine, values, judged = watched()
    a = torch.randn(8, 1024, device=GPU).bfloat16()
    out = torch.empty(8, 2048, dtype=torch.bfloat16, device=GPU)
    broken = torch.ones(8, 2048, dtype=torch.bfloat16, device=GPU)

    def once() -> None:
        torch.mm(a, values, out=out)
        out.mul_(broken)
        witness.see(mine, rows.WatchedCall(a, out))

    once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    witness.look()
    assert not judged and witness.layers()[0].counts["rows"] == 8 * 11
    broken[:, 256:384] = 0
    graph.replay()
    torch.cuda.synchronize()
    witness.look()
    assert judged and all(found.status == FAULT for *_, found in judged)
    assert judged[0][2].columns[0] >= 256 and judged[0][2].columns[1] < 384


def test_looking_does_not_spoil_what_another_thread_captures():
    witness, mine, values, judged = watched()
    a = torch.randn(8, 1024, device=GPU).bfloat16()
    out = torch.empty(8, 2048, dtype=torch.bfloat16, device=GPU)
    torch.mm(a, values, out=out)
    witness.see(mine, rows.WatchedCall(a, out))
    torch.cuda.synchronize()
    looked, done = [], threading.Event()

    def looking() -> None:
        while not done.is_set():
            witness.look()
            witness.redraw(mine)
            looked.append(1)

    thread = threading.Thread(target=looking)
    thread.start()
    try:
        for _ in range(20):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # captured in the mode that forbids most
                torch.mm(a, values, out=out)
                time.sleep(0.01)
                witness.see(mine, rows.WatchedCall(a, out))
            graph.replay()
    finally:
        done.set()
        thread.join()
    torch.cuda.synchronize()
    assert len(looked) > 3


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU with programmatic dependent launch",
)
def test_the_edge_to_a_gemm_stays_and_the_one_behind_it_is_named():
    from fp4tune.probes.regimes.pdl.edges import EdgesHidden
    from fp4tune.probes.zoo.pdl import PdlGemm
    from fp4tune.witness import edges

    backend = PdlGemm("right", "first", zeroing=True)
    witness, mine, _, _ = watched()
    state = backend.prepare(weight(2048, 1024).to(GPU), Problem("nvfp4", 16, 2048, 1024))
    a = torch.randn(16, 1024, device=GPU).bfloat16()
    out = torch.empty(16, 2048, dtype=torch.bfloat16, device=GPU)
    found = []
    for see in (False, True):

        def twice(see: bool = see) -> None:
            for _ in range(2):
                backend.run(state, a, out, "default")
                if see:
                    witness.see(mine, rows.WatchedCall(a, out))

        twice()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            twice()
            try:
                stream = torch.cuda.current_stream().cuda_stream
                found.append(edges.captured(stream))
            except EdgesHidden as error:
                pytest.skip(str(error))
    bare, with_it = found
    assert edges.lost(bare, with_it) == [("gemm", "zero", 1)]
    assert edges.touched(bare, with_it, ["gemm"]) == []
