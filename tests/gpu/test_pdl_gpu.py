"""Every race under programmatic dependent launch is caught, and no kernel that waits is flagged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fp4tune.probes.backends import tactics
from fp4tune.probes.data import exact
from fp4tune.probes.launch.case import Launch, case
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.registry import load_one
from fp4tune.probes.worker.session import OpenLayer
from fp4tune.probes.zoo.pdl import PdlGemm
from fp4tune.probes.zoo.quantiser import QuantisingGemm

SM = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SM < (9, 0), reason="needs a GPU with programmatic dependent launch"),
]
RACES = ("pdl-raw", "pdl-war", "pdl-waw")
MS = (1, 16, 64, 257)
FEW = Budget(6, 6, 0.0)
DEVICE = Device("cuda", 10 * SM[0] + SM[1])


@dataclass(frozen=True, slots=True)
class Subject:
    backend: Any
    caught_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.backend.name


SUBJECTS = (
    Subject(PdlGemm("waits-first", "first")),
    Subject(PdlGemm("weights-before-wait", "weights")),
    Subject(PdlGemm("waits-fp4", "first", "fp4")),
    Subject(QuantisingGemm("quantises-and-waits")),
    Subject(PdlGemm("never", "never"), RACES),
    Subject(PdlGemm("some-blocks", "some"), RACES),
    Subject(PdlGemm("wait-last", "last"), RACES),
    Subject(PdlGemm("zeroed-before-wait", "zeroed"), ("pdl-war",)),
    Subject(PdlGemm("own-zeroed-output", "never", own_output=True), ("pdl-raw",)),
    Subject(PdlGemm("behind-its-zeroing-kernel", "never", zeroing=True), RACES),
    Subject(PdlGemm("fp4-never", "never", "fp4"), RACES),
    Subject(PdlGemm("fp4-scales-before-wait", "scales", "fp4"), ("pdl-raw",)),
    Subject(QuantisingGemm("quantises-too-early", waits=False), ("pdl-raw",)),
)


def run(regime: str, backend: Any, ms=MS, n=1024, k=1024, budget=FEW):
    problem = Problem("nvfp4", 2 * max(ms), n, k, backend.activation)
    cases = [case(backend, problem, exact(problem, 24, seed, "cuda")) for seed in (1, 2)]
    launches = [
        Launch(i % 2, 3 * i, m, tactics(backend, problem.at(m), DEVICE)[0], i)
        for i, m in enumerate(ms)
    ]
    return REGIMES[regime](backend, cases, launches, budget)


@pytest.mark.parametrize("regime", RACES)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_race_is_caught_and_a_wait_is_not(subject, regime):
    outcome = run(regime, subject.backend)
    assert outcome.not_exercised is None, outcome.proof
    assert not outcome.exempt and not outcome.changed_inputs
    bad = [(x.m, r) for x, r in outcome.reports if not r.clean]
    if regime in subject.caught_by:
        assert bad, outcome.proof
    elif not subject.caught_by:
        assert not bad, (bad, outcome.proof)


@pytest.mark.parametrize("regime", RACES)
def test_each_call_that_never_waits_is_caught_in_its_first_ten_launches(regime):
    outcome = run(regime, PdlGemm("never", "never"), budget=Budget(5, 5, 0.0))
    assert outcome.repeats <= 12
    for item in range(len(MS)):
        assert any(not r.clean for x, r in outcome.reports if x.item == item), outcome.proof


def test_early_writes_are_told_from_late_ones():
    war = run("pdl-war", PdlGemm("never", "never"))
    assert any(report.early for _, report in war.reports)
    assert not any(report.early for _, report in run("pdl-waw", PdlGemm("r", "first")).reports)


@pytest.mark.parametrize("regime", RACES)
def test_a_kernel_launched_without_the_attribute_is_exempt(regime):
    outcome = run(regime, PdlGemm("no-pdl", "never", pdl=False))
    assert set(outcome.exempt) == set(range(len(MS))) and not outcome.reports
    assert "without PDL" in outcome.exempt[0] and "gemm" in outcome.exempt[0]
    assert outcome.proof["calls"]["pdl"] == 0


def test_the_floor_is_exempt_and_not_blamed():
    outcome = run("pdl-raw", load_one("torch-dequant"))
    assert set(outcome.exempt) == set(range(len(MS)))


def test_pairs_and_quantisers_are_attacked_too():
    alone = run("pdl-raw", PdlGemm("waits-fp4", "first", "fp4"))
    with_its_own = run("pdl-raw", QuantisingGemm("quantises"))
    assert alone.proof["pairs"] == with_its_own.proof["pairs"] == 2
    assert len(alone.reports) == len(MS) + 4
    assert len(with_its_own.reports) == len(alone.reports) + len(MS)
    assert any("quantise" in name for name in with_its_own.proof["kernels"])


def test_both_modes_ran_with_their_controls():
    proof = run("pdl-raw", PdlGemm("waits", "first")).proof
    for mode in ("eager", "graph"):
        assert proof[mode]["good_control_flagged"] == 0
        assert 2 * proof[mode]["bad_control_flagged"] >= proof[mode]["rounds"] >= 3
    assert proof["calls"] == {"pdl": len(MS) + 2, "ordinary": 0, "nothing": 0, "unknown": 0}


@pytest.mark.parametrize("regime", RACES)
def test_a_layer_of_many_ranges_takes_about_a_second(regime):
    """Printed with ``-s``; what is asserted is that nothing is missed at a probe's own budget."""
    edges = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024]
    backend = load_one("triton-w4a16")
    problem = Problem("nvfp4", 1100, 4096, 4096)
    layer = OpenLayer(backend, DEVICE, problem, 3, 8 << 30, lambda text: None)
    items = [Item((m,), tactics(backend, problem.at(m), DEVICE)[0]) for m in edges]
    layer.grade(items[:1])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    layer.regime(regime, items, Budget(4, 100, 0.25))
    start.record()
    found = layer.regime(regime, items, Budget(4, 100, 0.25))
    end.record()
    end.synchronize()
    print(f"{regime}: {start.elapsed_time(end):.0f} ms", found["proof"])
    assert all("exempt" in item or item["launches"] for item in found["items"])
    assert not any(item["bad"] for item in found["items"])


def test_memory_too_small_for_one_chain_splits_it():
    layer = OpenLayer(
        PdlGemm("never", "never"), DEVICE, Problem("nvfp4", 70, 512, 512), 3, 1, lambda text: None
    )
    items = [Item((1, 16), "default"), Item((64,), "default")]
    found = layer.regime("pdl-raw", items, FEW)
    assert found["not_exercised"] is None and len(found["proof"]) == 3
    assert all(item["bad"] for item in found["items"])
