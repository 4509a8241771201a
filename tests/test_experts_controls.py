"""Each regime of routed experts flags what is wrong, and passes what is right."""

from __future__ import annotations

import pytest
import torch

from fp4tune.autotune.stages.controls import ROUTED, _flagged
from fp4tune.probes import registry
from fp4tune.probes.grouped.zoo.controls import CONTROLS, GOOD, INTERNAL, MS, NONE_NEEDED, PROBLEM
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget, NotApplicable
from fp4tune.probes.problem import Device
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.regimes.concurrent import shared_expert
from fp4tune.probes.regimes.concurrent.lanes import run_threads
from fp4tune.probes.worker.experts import WITHOUT, OpenExperts

ON_GPU = {"graph", "side-stream", "regrow", "threads", "graph-streams"}
BRIEF = Budget(3, 20, 0.02)


@pytest.fixture(scope="module")
def layer():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    backend = registry.load_one(ROUTED.name)
    yield OpenExperts(backend, Device("cpu"), PROBLEM, 5, 1 << 28, lambda text: None)
    torch.set_num_threads(before)


def flagged(layer, regime, tactic):
    result = layer.regime(regime, [Item(MS, tactic, 8)], BRIEF)
    return _flagged(result["items"][0])


def test_every_regime_of_experts_has_controls_or_says_why_not():
    assert sorted([*CONTROLS, *INTERNAL, *NONE_NEEDED, *WITHOUT]) == sorted(REGIMES)


HOST = ("history", "weights")
"""Of thousands of calls, and of hundreds of weights: run with the slow tests."""


@pytest.mark.parametrize(
    "regime",
    [
        pytest.param(r, marks=pytest.mark.slow) if r in HOST else r
        for r in CONTROLS
        if r not in ON_GPU
    ],
)
def test_each_regime_flags_its_bad_control_and_passes_the_good_one(layer, regime):
    assert not flagged(layer, regime, GOOD)
    assert any(flagged(layer, regime, CONTROLS[regime].tactic) for _ in range(3))


def test_what_experts_are_not_run_in_says_why(layer):
    for regime, why in WITHOUT.items():
        with pytest.raises(NotApplicable, match=why[:20]):
            layer.regime(regime, [Item(MS, GOOD, 8)], BRIEF)


def test_a_dense_layer_has_no_shared_expert():
    dense = registry.load_one("torch-dequant")
    with pytest.raises(NotApplicable, match="dense"):
        REGIMES["shared-expert"](dense, [], [], BRIEF)


def test_no_layer_is_on_two_streams_beside_a_shared_expert(layer, monkeypatch):
    """As locks of a layer want it, which engines have on one stream at a time."""
    seen = []

    def spied(rounds, *rest):
        seen.extend(rounds)
        return run_threads(rounds, *rest)

    monkeypatch.setattr(shared_expert, "run_threads", spied)
    layer.regime("shared-expert", [Item((1, 2, 3, 4, 5, 6, 7), GOOD, 8)], BRIEF)
    layers = {id(case.state) for case in layer.cases(8)}
    assert len(layers) > 1 and seen
    used = set()
    for each in seen:
        first, second = (
            {id(layer.cases(8)[call.launch.case].state) for call in each.lanes[lane]}
            for lane in (0, 2)
        )
        assert first and second and not first & second
        used |= first
    assert used == layers
