"""Marlin's routed experts on a GPU: every tactic of SGLang's and vLLM's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from emulator import marlin as emulated

from fp4tune.probes import registry
from fp4tune.probes.backends import build_kernels, tactics
from fp4tune.probes.backends._experts import localised
from fp4tune.probes.backends.sglang_marlin import _build
from fp4tune.probes.grouped import routing
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device
from fp4tune.probes.worker.experts import OpenExperts

pytestmark = pytest.mark.gpu
NAMES = ("marlin-experts", "vllm-marlin-experts")
LAYERS = {
    "nvfp4": ExpertsProblem("nvfp4", 192, 192, 256, groups=12, top_k=3, scaling=2.5),
    "nvfp4-many": ExpertsProblem("nvfp4", 70, 64, 128, groups=96, top_k=8),
    "nvfp4-ungated": ExpertsProblem("nvfp4", 96, 160, 384, groups=8, top_k=2, gate="relu2"),
    "nvfp4-long": ExpertsProblem("nvfp4", 40, 512, 4096, groups=4, top_k=2),
    "mxfp4": ExpertsProblem("mxfp4", 192, 192, 512, groups=12, top_k=3, scaling=2.5),
    "mxfp4-oai": ExpertsProblem("mxfp4", 70, 2880, 2880, groups=6, top_k=4, gate="swiglu-oai"),
    "mxfp4-limit": ExpertsProblem("mxfp4", 70, 288, 512, groups=80, top_k=6, gate="swiglu-10"),
    # The shape that SGLang has a tile of its own for, at one token.
    "mxfp4-narrow": ExpertsProblem("mxfp4", 8, 320, 5120, groups=8, top_k=6),
}
"""None of their sizes is a tile's alone, and the tokens are no block's."""


def here():
    major, minor = torch.cuda.get_device_capability()
    return Device("cuda", 10 * major + minor)


def opened(name, layer):
    backend, p, device = registry.load_one(name), LAYERS[layer], here()
    if reason := backend.unsupported(p, device):
        pytest.skip(reason)
    build_kernels(backend, [p], device, 8)
    return backend, OpenExperts(backend, device, p, 3, 1 << 30, lambda text: None)


def wrong(results):
    return [b for r in results for b in r["bad"]] + [r["error"] for r in results if "error" in r]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_tactic_and_law_is_exact(name, layer):
    backend, layer_ = opened(name, layer)
    p = LAYERS[layer]
    ms = tuple(m for m in (0, 1, 2, 3, 5, 9, 17, 33, 64, 65, 129) if m <= p.m)
    wanted = {t: None for m in (1, 8, p.m) for t in tactics(backend, p.at(m), here())}
    items = [Item(ms, tactic, 8) for tactic in wanted]
    found = layer_.grade(items)
    assert not wrong(found)
    assert all(set(r["stages"].values()) == {"exact"} for r in found)
    for law in routing.ODD:
        assert not wrong(layer_.family(law, items))


@pytest.mark.parametrize("layer", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("name", NAMES)
def test_graphs_and_streams_share_no_locks(name, layer):
    _, layer_ = opened(name, layer)
    items = [Item((1, 3, 16), "default", 8), Item((40, 128), "default", 8)]
    layer_.grade(items)
    for regime in ("graph", "side-stream", "streams", "graph-streams"):
        result = layer_.regime(regime, items, Budget(3, 100, 0.3))
        assert not wrong(result["items"]) and not result["not_exercised"]


def test_ids_and_weights_are_made_local_in_one_launch():
    ids = torch.tensor([[-7, -1, 0, 5, 6, 1 << 30]], dtype=torch.int32)
    weights = torch.tensor([[1.0, torch.nan, 0.5, 2.0, 3.0, 4.0]])
    for elsewhere in (-1, 6):
        right = localised(ids, weights, 6, elsewhere, 2.5)
        found = localised(ids.cuda(), weights.cuda(), 6, elsewhere, 2.5)
        assert torch.equal(found[0].cpu(), right[0])
        assert torch.equal(found[1].cpu().nan_to_num(), right[1].nan_to_num())
        assert localised(ids.cuda(), None, 6, elsewhere)[1] is None


def test_sglang_repacks_as_emulated():
    if reason := _build.missing(("repack",)):
        pytest.skip(reason)
    repack = _build.load("repack", here().sm)["gptq_marlin_repack"]
    k, n = 192, 320
    draw = torch.Generator().manual_seed(3)
    q = torch.randint(-(2**31), 2**31, (k // 8, n), generator=draw).int()
    right = torch.empty(k // 16, 2 * n, dtype=torch.int32)
    emulated.repack(q, torch.empty(0), right, k, n, 4)
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    found = torch.empty_like(right, device="cuda")
    repack(q.cuda(), none, found, k, n, 4)
    assert torch.equal(found.cpu(), right)
