"""FlashInfer's routed experts on a GPU: right bit by bit, eagerly, in graphs, for each tactic."""

from __future__ import annotations

import pytest
import torch

from fp4tune.probes import registry
from fp4tune.probes.backends import build_kernels, tactics
from fp4tune.probes.backends.flashinfer import experts_build
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device
from fp4tune.probes.worker.experts import OpenExperts

pytestmark = pytest.mark.gpu
GATES = ("swiglu", "swiglu-10", "swiglu-oai", "relu2")


def opened(name, problem):
    """The backend on the problem, built; skipped where it cannot run here."""
    major, minor = torch.cuda.get_device_capability()
    device = Device("cuda", 10 * major + minor)
    backend = registry.load_one(name)
    if reason := backend.unsupported(problem, device):
        pytest.skip(reason)
    if name == "flashinfer-cutlass-experts" and experts_build.library() is None:
        pytest.skip("its library is not built, which takes minutes")
    build_kernels(backend, [problem], device, 8)
    return OpenExperts(backend, device, problem, 3, 1 << 30, lambda text: None), device


def wrong(results):
    return [b for r in results for b in r["bad"]] + [r["error"] for r in results if "error" in r]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("format_", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("name", ["flashinfer-cutlass-experts", *registry.FLASHINFER_EXPERTS])
def test_right_eagerly_and_in_graphs(name, format_, gate):
    problem = ExpertsProblem(format_, 128, 384, 512, groups=16, top_k=4, gate=gate, scaling=2.0)
    layer, _ = opened(name, problem)
    items = [Item((1, 3, 16), "default", 8), Item((40, 128), "default", 8)]
    assert not wrong(layer.grade(items))
    for regime in ("graph", "side-stream"):
        result = layer.regime(regime, items, Budget(2, 20, 0.2))
        assert not wrong(result["items"]) and not result["not_exercised"]


def test_padded_sizes_are_right():
    problem = ExpertsProblem("mxfp4", 64, 480, 800, groups=8, top_k=2, gate="swiglu-oai")
    layer, _ = opened("flashinfer-cutlass-experts", problem)
    assert not wrong(layer.grade([Item((1, 7, 64), "default", 8)]))


def test_every_tactic_is_right():
    problem = ExpertsProblem("mxfp4", 96, 512, 1024, groups=8, top_k=2)
    layer, device = opened("flashinfer-cutlass-experts", problem)
    every = tactics(layer.backend, problem, device)
    assert every[0] == "default" and len(set(every)) == len(every)
    failed = {t: wrong(layer.grade([Item((1, 33, 96), t, 8)])) for t in every}
    assert not {t: f[0] for t, f in failed.items() if f}
