"""Launches at length on a GPU: chains stay as captured, problems change, and faults are found."""

from __future__ import annotations

import pytest
import torch

from fp4tune.probes.data import exact, steady
from fp4tune.probes.launch.item import Item, LaunchAim
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.registry import load_one
from fp4tune.probes.worker.replay import recall
from fp4tune.probes.worker.session import OpenLayer

pytestmark = pytest.mark.gpu

PROBLEM = Problem("nvfp4", 320, 512, 1024)
ITEMS = [Item((1,), "default"), Item((5, 8), "default"), Item((17, 64, 33), "default")]
AIM = LaunchAim(launches=6000, problems=120, seconds=6.0)
BUDGET = Budget(1, 1, 0.0)


def opened(backend) -> OpenLayer:
    device = Device("cuda", 10 * torch.cuda.get_device_capability()[0], 0)
    return OpenLayer(backend, device, PROBLEM, 3, 4 << 30, lambda text: None)


def items(layer: OpenLayer) -> list[Item]:
    own = getattr(layer.backend, "tactics", None)
    name = own(PROBLEM, layer.device)[0] if own else "default"
    return [Item(item.ms, name) for item in ITEMS]


@pytest.mark.parametrize(
    "regime", ["serial", "graph", "churn", "regrow", "mlp-chain", "streams", "graph-streams"]
)
@pytest.mark.parametrize("name", ["torch-dequant", "zoo-weights-before-wait"])
def test_what_is_right_passes_on_as_many_problems_as_were_asked_for(name, regime):
    layer = opened(load_one(name))
    found = layer.regime(regime, items(layer), BUDGET, AIM)
    assert found["not_exercised"] is None
    for result in found["items"]:
        assert not result["bad"] and "error" not in result
        assert result["launches"] > 200 and result["problems"] > 50


def test_a_gpu_draws_what_a_cpu_does():
    for where in ("cuda", "cpu"):
        operands = steady(PROBLEM, 24, 5, where)
        operands.rows.fill(operands.a, 9)
        drawn = operands.a.cpu()
        if where == "cuda":
            first, weight = drawn, operands.weight.codes.cpu()
    assert torch.equal(first, drawn) and torch.equal(weight, operands.weight.codes)


class Stale:
    """Computes with the rows that its graph was captured with: as a cache by pointer would."""

    name, activation, layout = "stale", "bf16", "plain"

    def __init__(self):
        self.right = load_one("torch-dequant")
        self.kept: dict[int, torch.Tensor] = {}

    def unsupported(self, problem, device):
        return None

    def prepare(self, weight, problem):
        return self.right.prepare(weight, problem)

    def run(self, state, a, out, tactic):
        if a.data_ptr() not in self.kept and not torch.cuda.is_current_stream_capturing():
            self.kept[a.data_ptr()] = a.clone()
        self.right.run(state, self.kept.get(a.data_ptr(), a), out, "bf16")


def test_what_keeps_its_rows_is_found_by_the_second_draw_and_made_again():
    layer = opened(Stale())
    (result,) = layer.regime("graph", [Item((4,), "default")], BUDGET, AIM)["items"]
    assert result["bad_launches"]
    bad = result["bad"][0]
    assert bad["draw"] >= 1
    cases, launches = recall(layer, bad)
    mine = next(x for x in launches if x.item == 1)
    again = steady(PROBLEM, 24, bad["seed"], "cuda")
    again.rows.fill(again.a, bad["draw"])
    window = slice(mine.offset, mine.offset + mine.m)
    assert torch.equal(cases[mine.case].operands.a[window], again.a[window])
    assert exact(PROBLEM, 24, bad["seed"], "cuda").rows is None


def test_every_m_is_launched_once():
    layer = opened(load_one("zoo-weights-before-wait"))
    every = [Item(tuple(range(1, 65)), "default"), Item(tuple(range(65, 257)), "default")]
    found = layer.regime("every-m", every, Budget(1, 1, 60.0))["items"]
    assert [part["problems"] for part in found] == [64, 192]
    assert not any(part["bad"] for part in found)
