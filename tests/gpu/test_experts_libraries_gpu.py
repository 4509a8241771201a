"""Libraries' grouped GEMMs on a GPU: every tactic exact, in every stage, law, format and shape."""

from __future__ import annotations

import pytest
import torch

from fp4tune.probes import registry
from fp4tune.probes.backends import _triton_kernels, build_kernels, tactics
from fp4tune.probes.grouped import exact, routing, slots
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device
from fp4tune.probes.worker.experts import OpenExperts

pytestmark = pytest.mark.gpu

HUMMING = ("humming-indexed", "humming-grouped", "humming-masked")
OGS = ("vllm-ogs", "vllm-ogs-unfused", "triton-kernels")
SHAPES = [
    # (intermediate, hidden, experts, top-k): whole tiles, and none
    (256, 512, 8, 2),
    (96, 160, 5, 3),
    (480, 736, 16, 4),
    (128, 256, 3, 1),
]


def here() -> Device:
    major, minor = torch.cuda.get_device_capability()
    return Device("cuda", 10 * major + minor, torch.cuda.current_device())


def opened(name, problem):
    backend, device = registry.load_one(name), here()
    if reason := backend.unsupported(problem, device):
        pytest.skip(reason)
    if name in OGS:
        own = _triton_kernels.packaged if name == "triton-kernels" else _triton_kernels.vendored
        try:
            _triton_kernels._package_loaded(own())
        except RuntimeError as other:
            pytest.skip(str(other))
    sizes = [problem.at(m) for m in (1, 9, 64, 300)]
    build_kernels(backend, sizes, device, 8)
    layer = OpenExperts(backend, device, problem, 3, 1 << 30, lambda text: None)
    every = dict.fromkeys(t for p in sizes for t in tactics(backend, p, device))
    ms = tuple(m for m in (0, 1, 3, 17, 129, 300) if m <= problem.m)
    return layer, [Item(ms, tactic, 8) for tactic in every]


def wrong(results):
    return [b for r in results for b in r["bad"]] + [r["error"] for r in results if "error" in r]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", ["swiglu", "swiglu-oai", "swiglu-10", "relu2"])
@pytest.mark.parametrize("format_", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("name", HUMMING)
def test_humming_is_exact_in_every_tactic_and_stage(name, format_, gate, shape):
    n, k, groups, top_k = shape
    problem = ExpertsProblem(format_, 300, n, k, groups=groups, top_k=top_k, gate=gate, scaling=2.5)
    layer, items = opened(name, problem)
    found = layer.grade(items)
    assert not wrong(found)
    for result in found:
        assert set(result["stages"]) == {"permute", "gemm1", "activate", "gemm2", "finalize"}
    for law in routing.ODD:
        assert not wrong(layer.family(law, items)), law


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", ["swiglu", "swiglu-oai", "swiglu-10"])
@pytest.mark.parametrize("name", OGS)
def test_triton_kernels_is_exact_in_every_stage(name, gate, shape):
    n, k, groups, top_k = shape
    problem = ExpertsProblem("mxfp4", 300, n, k, groups=groups, top_k=top_k, gate=gate, scaling=2.5)
    layer, items = opened(name, problem)
    found = layer.grade(items)
    assert not wrong(found)
    for law in routing.ODD:
        assert not wrong(layer.family(law, items)), law


@pytest.mark.parametrize("name", [*HUMMING, *OGS])
def test_graphs_replay_exactly(name):
    gate = "swiglu-oai"
    problem = ExpertsProblem("mxfp4", 192, 480, 768, groups=16, top_k=4, gate=gate, scaling=2.5)
    layer, items = opened(name, problem)
    for regime in ("graph", "side-stream", "rewrite"):
        result = layer.regime(regime, items[:1], Budget(2, 40, 0.2))
        assert not wrong(result["items"]) and not result["not_exercised"], regime


@pytest.mark.parametrize("name", [*HUMMING, *OGS])
def test_new_values_answer_in_place(name):
    problem = ExpertsProblem("mxfp4", 48, 128, 256, groups=8, top_k=2, gate="swiglu-oai")
    layer, items = opened(name, problem)
    backend, device = layer.backend.own, layer.device.torch
    every = range(problem.groups)
    old, new = (exact.draw_weights(layer.experts, s, device, every, False) for s in (11, 12))
    state = backend.prepare(old, layer.experts)
    for weights in (old, new):
        backend.update(state, weights, layer.experts)
        drawn, right = exact.draw_tokens(layer.experts, weights, every, ("balanced",), 5)
        out = torch.full_like(drawn.a.x, torch.nan)
        backend.run(state, drawn.a.x, drawn.a.ids, drawn.a.weights, out, items[0].tactic)
        assert torch.equal(out, right.lo)


@pytest.mark.parametrize("law", routing.LAWS)
@pytest.mark.parametrize(("tokens", "groups", "top_k", "block"), [(1, 8, 2, 16), (700, 160, 6, 48)])
def test_slots_are_sorted_and_moved_as_on_a_cpu(law, tokens, groups, top_k, block):
    ids = routing.route(law, tokens, range(groups), top_k, 7).ids
    right, made = slots.sort_slots(ids, groups, block), slots.sort_slots(ids.cuda(), groups, block)
    end = int(right.total)
    assert torch.equal(made.rows[:end].cpu(), right.rows[:end])
    assert torch.equal(made.experts[: end // block].cpu(), right.experts[: end // block])
    for part in ("places", "offsets", "counts", "total"):
        assert torch.equal(getattr(made, part).cpu(), getattr(right, part)), part
    masked = slots.mask_rows(ids.cuda(), groups)
    assert torch.equal(masked.places.cpu(), slots.mask_rows(ids, groups).places)
    x = torch.randn(tokens, 1500, device="cuda").bfloat16()
    y = slots.spread_rows(x, made.places, len(made.rows))
    weights, out, want = torch.rand(ids.shape), torch.empty_like(x), torch.empty_like(x).cpu()
    slots.combine_rows(y, made.places, weights.cuda(), out, 2.0)
    slots.combine_rows(y.cpu(), right.places, weights, want, 2.0)
    assert torch.allclose(out.cpu(), want, rtol=2e-2, atol=1e-3)
