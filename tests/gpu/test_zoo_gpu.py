"""Mutants and controls on a real GPU: kernels that are right, and races that are seen at once."""

from __future__ import annotations

import pytest
import torch

from fp4tune.autotune.stages import controls as running
from fp4tune.probes import registry, zoo
from fp4tune.probes.launch.item import Item
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.regimes import Budget
from fp4tune.probes.worker.session import OpenLayer
from fp4tune.probes.zoo.controls import CONTROLS, GOOD, MS, NAME, PROBLEM

pytestmark = pytest.mark.gpu

N, K = 320, 272
PDL = ("pdl-raw", "pdl-war", "pdl-waw")
SM = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
needs_pdl = pytest.mark.skipif(SM < (9, 0), reason="needs programmatic dependent launch")
MUTANTS = zoo.mutants("cuda")


@pytest.fixture(scope="module")
def device() -> Device:
    return Device("cuda", 10 * SM[0] + SM[1])


@pytest.fixture(scope="module")
def layer(device) -> OpenLayer:
    return OpenLayer(registry.load_one(NAME), device, PROBLEM, 3, 1 << 30, lambda text: None)


def opened(mutant: zoo.Mutant, device: Device, n: int = N, k: int = K) -> OpenLayer:
    problem = Problem("nvfp4", 160, n, k, mutant.activation)
    backend = registry.load_one(mutant.name)
    assert backend.unsupported(problem, device) is None
    return OpenLayer(backend, device, problem, 4, 1 << 30, lambda text: None)


def part(layer: OpenLayer, regime: str, item: Item, budget: Budget) -> dict:
    result = layer.regime(regime, [item], budget)
    assert result["not_exercised"] is None
    return result["items"][0]


@pytest.mark.parametrize("regime", CONTROLS)
def test_each_regime_flags_its_bad_control_and_only_that(layer, regime):
    budget = Budget(**running.BUDGET)
    good = part(layer, regime, Item(MS, GOOD), budget)
    assert running._flagged(good) == "" and "error" not in good, good
    tried = [
        part(layer, regime, Item(MS, CONTROLS[regime].tactic), budget) for _ in range(running.TRIES)
    ]
    assert any(map(running._flagged, tried)), tried


def peaceful(mutant: zoo.Mutant) -> bool:
    """Whether it is right alone, one launch after the other, on exact data."""
    # One that the largest scales overflow does not hold exact sums of 24 bits either.
    wrong = {"serial", "exact", "census", "max-scales"}
    return mutant.passes or not (wrong & {*mutant.caught_by} or mutant.many)


def needs(mutant: zoo.Mutant) -> list[pytest.MarkDecorator]:
    problem = Problem("nvfp4", 160, N, K, mutant.activation)
    before = zoo.named(mutant.name).unsupported(problem, Device("cuda", 80))
    return [needs_pdl] if before else []


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, id=m.name, marks=needs(m)) for m in MUTANTS if peaceful(m)]
)
def test_what_is_right_in_peace_is_right_bit_for_bit(mutant, device):
    layer = opened(mutant, device, n=1088, k=1040)
    for m in (1, 16, 17, 65, 130):
        (result,) = layer.grade([Item((m,), "default")])
        assert result["width"] in ((24, 8) if mutant.passes else (24,)), (m, result)


@needs_pdl
@pytest.mark.parametrize(
    "mutant",
    [m for m in MUTANTS if {*PDL} & {*m.caught_by} and m.level == "quick"],
    ids=lambda m: m.name,
)
def test_a_race_is_seen_in_the_first_ten_launches_of_an_adversary(mutant, device):
    layer = opened(mutant, device, n=1024, k=1024)
    seen = {}
    for regime in PDL:
        if regime in mutant.caught_by:
            found = part(layer, regime, Item((1, 16, 130), "default"), Budget(10, 10, 0.0))
            seen[regime] = [bad["kind"] for bad in found["bad"]]
    assert any(seen.values()), seen


@needs_pdl
@pytest.mark.parametrize("name", ["zoo-weights-before-wait", "zoo-waits-w4a4", "zoo-own-buffer"])
@pytest.mark.parametrize("regime", PDL)
def test_who_waits_is_never_flagged(name, regime, device):
    (mutant,) = [m for m in MUTANTS if m.name == name]
    layer = opened(mutant, device, n=1024, k=1024)
    found = part(layer, regime, Item((1, 16, 130), "default"), Budget(10, 10, 0.0))
    assert not found["bad"] and "error" not in found


def test_what_cupti_keeps_of_launches_after_a_census_is_no_leak_of_the_backend(device):
    (mutant,) = [m for m in MUTANTS if m.name == "zoo-bf16-sums"]
    layer = opened(mutant, device, n=1088, k=1040)
    items = [Item(ms, "default", 8) for ms in ((1,), (2, 16), (17, 64), (130, 160))]
    layer.census(items)
    for _ in range(2):
        found = layer.regime("off-bucket", items, Budget(10, 100, 0.3))
        assert not any("error" in each or each["bad"] for each in found["items"])
