"""Routed experts on a GPU: the floor in graphs and on streams, and mutants that are found there."""

from __future__ import annotations

import pytest
import torch

from fp4tune.probes import registry
from fp4tune.probes.grouped import zoo
from fp4tune.probes.grouped.families import grouped_families
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.grouped.zoo.controls import CONTROLS, GOOD, MS, PROBLEM
from fp4tune.probes.launch.item import Item, LaunchAim
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device
from fp4tune.probes.worker.experts import OpenExperts

pytestmark = pytest.mark.gpu
MUCH = LaunchAim(launches=6000, problems=300, seconds=30.0)
REGIMES_HERE = (
    "graph",
    "side-stream",
    "pdl-raw",
    "pdl-war",
    "pdl-waw",
    "rewrite",
    "padding",
    "weights",
    "callers",
    "churn",
    "regrow",
    "streams",
    "shared-expert",
    "first-calls",
    "graph-streams",
)
ITEMS = [Item((1, 3, 16), "default", 8), Item((40, 128), "default", 8)]


def opened(name, format_="mxfp4", m=192):
    major, minor = torch.cuda.get_device_capability()
    problem = ExpertsProblem(format_, m, 480, 768, groups=16, top_k=4, scaling=2.5)
    device = Device("cuda", 10 * major + minor)
    return OpenExperts(registry.load_one(name), device, problem, 3, 1 << 30, lambda text: None)


def wrong(results):
    return [b for r in results for b in r["bad"]] + [r["error"] for r in results if "error" in r]


@pytest.mark.parametrize("format_", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("name", ["torch-experts", *zoo.names(right=True, gpu=True)])
def test_right_ones_pass(name, format_):
    layer = opened(name, format_)
    assert not wrong(layer.grade(ITEMS))
    for family in grouped_families(layer.asked):
        assert not wrong(layer.family(family.name, ITEMS)), family.name
    for regime in REGIMES_HERE:
        result = layer.regime(regime, ITEMS, Budget(3, 50, 0.2))
        assert not wrong(result["items"]) and not result["not_exercised"]


@pytest.mark.parametrize("name", zoo.names(right=False, gpu=True))
def test_mutants_are_found(name):
    # MXFP4 has no global scales to confuse.
    layer = opened(name, "nvfp4" if name.endswith("next-global") else "mxfp4")
    found = wrong(layer.grade([*ITEMS, Item((37, 40), "default", 8)]))
    if name.endswith("count-of-8-bits"):
        found += wrong(opened(name, m=320).grade([Item((256,), "default", 8)]))
    for family in grouped_families(layer.asked) if not found else ():
        found += wrong(layer.family(family.name, ITEMS))
    for regime in REGIMES_HERE if not found else ():
        found = found or wrong(layer.regime(regime, ITEMS, Budget(3, 100, 0.3))["items"])
    for regime in ("graph", "churn") if not found else ():
        found += wrong(layer.regime(regime, ITEMS, Budget(1, 1, 0.0), MUCH)["items"])
    assert found


@pytest.mark.parametrize("stage", ["permute", "gemm1", "activation", "gemm2", "finalize"])
def test_a_hasty_stage_is_found_by_the_adversary_before_it(stage):
    layer = opened(f"zoo-experts-hasty-{stage}")
    result = layer.regime("pdl-raw", ITEMS, Budget(3, 30, 0.3))
    assert not result["not_exercised"]
    bad = [b for item in result["items"] for b in item["bad"]]
    assert {b.get("stage") for b in bad} >= {stage.replace("activation", "activate")}


@pytest.mark.parametrize("regime", ["graph", "pdl-raw", "shared-expert"])
def test_the_floor_stays_right_while_tokens_are_drawn_anew(regime):
    layer = opened("torch-experts")
    result = layer.regime(regime, ITEMS, Budget(1, 1, 0.0), MUCH)
    assert not wrong(result["items"]) and not result["not_exercised"]
    assert all(item["problems"] > 100 for item in result["items"])


@pytest.mark.parametrize("regime", [r for r in CONTROLS if r not in ("history", "weights")])
def test_each_regime_flags_its_control_on_a_gpu(regime):
    major, minor = torch.cuda.get_device_capability()
    device = Device("cuda", 10 * major + minor)
    backend = registry.load_one("controls-experts")
    layer = OpenExperts(backend, device, PROBLEM, 5, 1 << 30, lambda text: None)

    def flagged(tactic):
        result = layer.regime(regime, [Item(MS, tactic, 8)], Budget(3, 50, 0.2))
        return bool(wrong(result["items"]))

    assert not flagged(GOOD)
    assert any(flagged(CONTROLS[regime].tactic) for _ in range(3))
