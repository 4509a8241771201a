"""Routed experts on a GPU: the floor in graphs and on streams, and mutants that are found there."""

from __future__ import annotations

import pytest
import torch

from fp4tune.probes import registry
from fp4tune.probes.grouped import zoo
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device
from fp4tune.probes.worker.experts import OpenExperts

pytestmark = pytest.mark.gpu
ITEMS = [Item((1, 3, 16), "default", 8), Item((40, 128), "default", 8)]


def opened(name, format_="mxfp4"):
    major, minor = torch.cuda.get_device_capability()
    problem = ExpertsProblem(format_, 192, 480, 768, groups=16, top_k=4, scaling=2.5)
    device = Device("cuda", 10 * major + minor)
    return OpenExperts(registry.load_one(name), device, problem, 3, 1 << 30, lambda text: None)


def wrong(results):
    return [b for r in results for b in r["bad"]] + [r["error"] for r in results if "error" in r]


@pytest.mark.parametrize("format_", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("name", ["torch-experts", *zoo.names(right=True)])
def test_right_ones_pass(name, format_):
    layer = opened(name, format_)
    assert not wrong(layer.grade(ITEMS))
    for regime in ("graph", "side-stream", "streams", "graph-streams"):
        result = layer.regime(regime, ITEMS, Budget(3, 50, 0.2))
        assert not wrong(result["items"]) and not result["not_exercised"]


@pytest.mark.parametrize("name", zoo.names(right=False))
def test_mutants_are_found(name):
    layer = opened(name)
    laws = ("duplicates", "elsewhere", "padding-ids", "nan-router")
    found = wrong(layer.grade(ITEMS)) or [
        b for law in laws for b in wrong(layer.family(law, ITEMS))
    ]
    for regime in ("graph", "streams", "graph-streams") if not found else ():
        found += wrong(layer.regime(regime, ITEMS, Budget(3, 100, 0.3))["items"])
    assert found
